"""Markdown tables and figures with their intervals: how every page of evidence writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table; see `cell` for what its rows may hold."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value) -> str:
    """A value as a cell: floats with three decimals, None as a dash, and no bar that would end the cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("|", "\\|")


def estimate(entry: dict, form: str = ".3f", signed: bool = False) -> str:
    """An entry {"mean", "ci95"} as "0.612 (0.550 to 0.671)". signed: the mean always has its sign."""
    return with_interval(entry["mean"], entry["ci95"], form, signed)


def with_interval(value: float | None, ci95: Sequence[float] | None, form: str = ".3f", signed: bool = False) -> str:
    """A value and its bounds, each written by `form`; the value alone where it has no interval, a dash without one."""
    if value is None:
        return "-"
    text = f"{value:{'+' if signed else ''}{form}}"
    if ci95 is None:
        return text
    low, high = ci95
    return f"{text} ({low:{form}} to {high:{form}})"
