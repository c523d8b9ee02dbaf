"""Choices that contradict each other in a ring: A over B, B over C, C over A."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

Choice = tuple[int, int, int]  # row number, winner, loser


def on_cycles(choices: Iterable[tuple[int, int, int, int, int]]) -> Iterator[int]:
    """Numbers of the choices that lie on a cycle. choices: (user, prompt, number, winner, loser), grouped by the first
    two; one group is in memory at a time."""
    for _, group in groupby(choices, key=lambda choice: choice[:2]):
        edges = [choice[2:] for choice in group]
        part = components(edges)
        yield from (number for number, winner, loser in edges if part[winner] == part[loser])


def components(edges: list[Choice]) -> dict[int, int]:
    """{picture: number of its strongly connected component}. A choice lies on a cycle exactly when its two pictures
    share one (Tarjan 1972, with a stack instead of recursion: a group may be as long as a user's patience)."""
    after: dict[int, list[int]] = {}
    for _, winner, loser in edges:
        after.setdefault(winner, []).append(loser)
        after.setdefault(loser, [])
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    part: dict[int, int] = {}
    open_: list[int] = []
    for start in after:
        if start in order:
            continue
        order[start] = low[start] = len(order)
        open_.append(start)
        path = [(start, iter(after[start]))]
        while path:
            here, rest = path[-1]
            for there in rest:
                if there not in order:
                    order[there] = low[there] = len(order)
                    open_.append(there)
                    path.append((there, iter(after[there])))
                    break
                if there not in part:
                    low[here] = min(low[here], order[there])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[here])
                if low[here] == order[here]:
                    while True:
                        member = open_.pop()
                        part[member] = here
                        if member == here:
                            break
    return part
