"""The second edition's figures as a page."""

from __future__ import annotations

from ..tables import estimate, table

COLUMNS = ("alignment", "named", "continuous", "semantic", "specificity", "harmonic")


def page(result: dict) -> str:
    """world.md."""
    sections = [f"# The second edition, measured\n\n{head(result)}"]
    for size, figures in result["tables"].items():
        sections += [f"## {size} liked and {size} disliked pictures", rows_of(figures["rows"])]
        if figures["primary"]:
            sections += ["### The primary contrasts", contrasts_of(figures["primary"])]
        if figures["lines"]:
            sections += ["### Each idea and its line", lines_of(figures["lines"])]
        if figures["contrasts"]:
            sections += ["### PrefGen less every other row", contrasts_of(figures["contrasts"])]
    return "\n\n".join(sections) + "\n"


def head(result: dict) -> str:
    """What was painted, and what wasn't."""
    seeds = ", ".join(f"{name} {count}" for name, count in result["seeds"].items())
    lines = [
        f"`{result['command']}`: {len(result['users'])} test users that no choice was made with, "
        f"{len(result['prompts'])} held-out prompts, {result['each']} a user by turns. Read by judge B. Intervals: "
        "95 %, users and prompts drawn crossed, differences paired; Holm within each table.",
        f"Training seeds: {seeds}.",
    ]
    if result["tuned"]:
        chosen = ", ".join(f"{name} {values}" for name, values in result["tuned"].items())
        lines.append(f"Tuned on other users, by judge A: {chosen}.")
    if result["partners_overlap"] is not None:
        lines.append(f"Alignment that the partners' true tastes give by chance: {result['partners_overlap']:.3f}.")
    if result["unread"]:
        unread = ", ".join(result["unread"])
        lines.append(f"Left out of alignment, since judge B reads them too badly off renders: {unread}.")
    if result["left_out"]:
        lines.append(f"**Not run**: {', '.join(result['left_out'])}.")
    return "\n".join(lines)


def rows_of(rows: dict) -> str:
    """All rows, then what their pictures are like."""
    first = [[row["label"], *(estimate(row[column]) for column in COLUMNS)] for row in rows.values()]
    second = [
        [row["label"], estimate(row["subject"]), row["kid"], row["sharpness"], estimate(row["render_back"])]
        for row in rows.values()
    ]
    titles = ["row", "both judges name the subject", "KID", "sharpness beside renders", "render-back error"]
    return f"{table(['row', *COLUMNS], first)}\n\n{table(titles, second)}"


def contrasts_of(contrasts: dict) -> str:
    """Differences in the one number."""
    has_lines = any("line" in entry for entry in contrasts.values())
    titles = ["less", "difference", "p (Holm)", *(["line", "reached"] if has_lines else [])]
    rows = [
        [name, estimate(entry, signed=True), entry["p_holm"], *(verdict(entry) if has_lines else [])]
        for name, entry in contrasts.items()
    ]
    return table(titles, rows)


def lines_of(lines: list[dict]) -> str:
    """Each idea's difference beside its line."""
    rows = [
        [
            line["idea"],
            line["of"],
            line["row"],
            f"{line['measure']}, {line['users']} users",
            estimate(line, signed=True),
        ]
        + [line["p_holm"], *verdict(line)]
        for line in lines
    ]
    return table(["idea", "row", "less", "measure", "difference", "p (Holm)", "line", "reached"], rows)


def verdict(entry: dict) -> list:
    """[line, yes or no]."""
    return [entry["line"], "yes" if entry["reached"] else "no"]
