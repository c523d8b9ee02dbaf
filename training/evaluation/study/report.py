"""study.md: the figures as tables."""

from __future__ import annotations


def percent(value: float | None, ci95: list[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" ({ci95[0]:.1%} to {ci95[1]:.1%})" if ci95 else "")


def number(value: float | None, ci95: list[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({ci95[0]:.3f} to {ci95[1]:.3f})" if ci95 else "")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: str, rows: list[list]) -> str:
    columns = [name.strip() for name in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def page(result: dict) -> str:
    pairs, judges = result["pairs"], result["judges"]
    left_out = [judge for judge, entry in judges.items() if not entry["counted"]]
    checks, failed = (sum(e[name] for e in judges.values()) for name in ("repeats", "failed_repeats"))
    missing, incomplete = sum(e["missing"] for e in judges.values()), sum(e["missing"] > 0 for e in judges.values())
    rough = ""
    if min(len(judges) - len(left_out), result["users"]) < 5:
        rough = "\nWith fewer than five judges or users an interval is rough, and with one it leaves that side out.\n"
    wins = table(
        "methods | win rate of the first (95 %) | wins | losses | no difference | answers | users | judges",
        [
            [f"{cell(e['a'])} over {cell(e['b'])}", percent(e["win_rate"], e["ci95"]), e["wins"], e["losses"]]
            + [f"{e['no_difference']} ({percent(e['no_difference_rate'])})", e["answers"], e["users"], e["judges"]]
            for e in pairs
        ],
    )
    overall = table(
        "method | win rate over all it met (95 %) | no difference | answers",
        [
            [cell(method), percent(e["win_rate"], e["ci95"]), percent(e["no_difference_rate"]), e["answers"]]
            for method, e in result["overall"].items()
        ],
    )
    rows = [("all: which of the two pictures", result["agreement"])]
    rows += [(f"{e['a']} or {e['b']}", e["agreement"]) for e in pairs]
    agreement = table(
        "trials | shared by judges | Krippendorff's alpha (95 %) | two judges agree",
        [[cell(n), e["trials"], number(e["alpha"], e["ci95"]), percent(e["same_answer"])] for n, e in rows],
    )
    people = table(
        "judge | counted | answers | missing | repeats answered alike | left chosen (95 %) | no difference | median s",
        [
            [cell(judge), "yes" if e["counted"] else "no", e["answers"], e["missing"]]
            + [f"{e['repeats'] - e['failed_repeats']} of {e['repeats']}", percent(e["left"]["left"], e["left"]["ci95"])]
            + [percent(e["no_difference_rate"]), e["median_seconds"]]
            for judge, e in judges.items()
        ],
    )
    sides = percent(result["left"]["left"], result["left"]["ci95"])
    return f"""# Study {result["study"]}

{result["trials"]} comparisons and {result["repeats"]} mirrored repeats of {result["users"]} users, {
        len(judges)
    } judges,
{result["files"]} files.

## What was counted

| what | how many |
|---|---|
| answers that count below | {result["counted_answers"]} |
| judges who left trials out, and trials they left out | {incomplete}, {missing} |
| answers given twice (the latest counts), of these different | {result["duplicates"]}, {
        result["conflicting_duplicates"]
    } |
| repeats answered, of these not as the first time | {checks}, {failed} |
| judges left out, below a consistency of {result["min_consistency"]:g} | {", ".join(map(cell, left_out)) or "none"} |

Repeats serve the consistency of judges and are in no win rate.

## Win rates

"No difference" counts as half a win for each. Intervals: 95 % percentile bootstrap over users and over judges, each
resampled whole and on their own (crossed), {result["draws"]} draws.
{rough}
{wins}

{overall}

## Agreement between judges

Krippendorff's alpha for nominal values (a picture, the other, no difference): 1 is full agreement, 0 what chance gives.
Within one pair of methods alpha is low wherever one method nearly always wins, even if judges agree: read it with the
share beside it. Intervals: bootstrap over users.

{agreement}

## Judges

Sides are random, so that half of the choices should be left; all judges that count: {sides}.
Intervals of sides: Wilson, each choice for itself.

{people}
"""
