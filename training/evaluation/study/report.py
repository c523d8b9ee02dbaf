"""study.md: the figures as tables."""

from __future__ import annotations

from collections.abc import Sequence

from ..tables import table, with_interval


def page(result: dict) -> str:
    judges = result["judges"]
    sides = percent(result["left"]["left"], result["left"]["ci95"])
    return f"""# Study {result["study"]}

{result["trials"]} comparisons and {result["repeats"]} mirrored repeats of {result["users"]} users, \
{len(judges)} judges,
{result["files"]} files.

## What was counted

{counted(result)}

Repeats serve the consistency of judges and are in no win rate.

## Win rates

"No difference" counts as half a win for each. Intervals: 95 % percentile bootstrap over users and over judges, each
resampled whole and on their own (crossed), {result["draws"]} draws.
{few_clusters(result)}
{win_rates(result["pairs"])}

{overall_win_rates(result["overall"])}

## Agreement between judges

Krippendorff's alpha for nominal values (a picture, the other, no difference): 1 is full agreement, 0 what chance gives.
Within one pair of methods alpha is low wherever one method nearly always wins, even if judges agree: read it with the
share beside it. Intervals: bootstrap over users.

{agreements(result)}

## Judges

Sides are random, so that half of the choices should be left; all judges that count: {sides}.
Intervals of sides: Wilson, each choice for itself.

{judge_table(judges)}
"""


def percent(value: float | None, ci95: Sequence[float] | None = None) -> str:
    return with_interval(value, ci95, ".1%")


def counted(result: dict) -> str:
    judges = result["judges"].values()
    incomplete = sum(entry["missing"] > 0 for entry in judges)
    repeats = sum(entry["repeats"] for entry in judges)
    failed = sum(entry["failed_repeats"] for entry in judges)
    left_out = ", ".join(judge for judge, entry in result["judges"].items() if not entry["counted"])
    return table(
        ["what", "how many"],
        [
            ["answers that count below", result["counted_answers"]],
            [
                "judges who left trials out, and trials they left out",
                f"{incomplete}, {sum(entry['missing'] for entry in judges)}",
            ],
            [
                "answers given twice (the latest counts), of these different",
                f"{result['duplicates']}, {result['conflicting_duplicates']}",
            ],
            ["repeats answered, of these not as the first time", f"{repeats}, {failed}"],
            [f"judges left out, below a consistency of {result['min_consistency']:g}", left_out or "none"],
        ],
    )


def few_clusters(result: dict) -> str:
    """A warning where an interval rests on too few judges or users."""
    counted_judges = sum(entry["counted"] for entry in result["judges"].values())
    if min(counted_judges, result["users"]) >= 5:
        return ""
    return "\nWith fewer than five judges or users an interval is rough, and with one it leaves that side out.\n"


def win_rates(pairs: list[dict]) -> str:
    head = ["methods", "win rate of the first (95 %)", "wins", "losses", "no difference", "answers", "users", "judges"]
    return table(
        head,
        [
            [f"{e['a']} over {e['b']}", percent(e["win_rate"], e["ci95"]), e["wins"], e["losses"]]
            + [f"{e['no_difference']} ({percent(e['no_difference_rate'])})", e["answers"], e["users"], e["judges"]]
            for e in pairs
        ],
    )


def overall_win_rates(methods: dict) -> str:
    return table(
        ["method", "win rate over all it met (95 %)", "no difference", "answers"],
        [
            [method, percent(e["win_rate"], e["ci95"]), percent(e["no_difference_rate"]), e["answers"]]
            for method, e in methods.items()
        ],
    )


def agreements(result: dict) -> str:
    entries = {"all: which of the two pictures": result["agreement"]}
    entries |= {f"{e['a']} or {e['b']}": e["agreement"] for e in result["pairs"]}
    return table(
        ["trials", "shared by judges", "Krippendorff's alpha (95 %)", "two judges agree"],
        [
            [name, e["trials"], with_interval(e["alpha"], e["ci95"]), percent(e["same_answer"])]
            for name, e in entries.items()
        ],
    )


def judge_table(judges: dict) -> str:
    head = ["judge", "counted", "answers", "missing", "repeats answered alike", "left chosen (95 %)", "no difference"]
    return table(
        [*head, "median s"],
        [
            [judge, "yes" if e["counted"] else "no", e["answers"], e["missing"]]
            + [f"{e['repeats'] - e['failed_repeats']} of {e['repeats']}", percent(e["left"]["left"], e["left"]["ci95"])]
            + [percent(e["no_difference_rate"]), str(e["median_seconds"])]
            for judge, e in judges.items()
        ],
    )
