"""Choices and pictures as graphs: rings of choices that contradict each other, clusters of pictures that look alike."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def on_cycles(winners: np.ndarray, losers: np.ndarray) -> np.ndarray:
    """Which choices lie on a cycle such as A over B, B over C, C over A: bool [choices].

    winners, losers: numbers of pictures from 0 on, int [choices].
    """
    component = _components(winners, losers, "strong")
    # A choice lies on a cycle exactly when its loser leads back to its winner.
    return component[winners] == component[losers]


def clusters(pairs: np.ndarray) -> dict[int, int]:
    """{member: the smallest of its cluster} for everything that a chain of pairs joins, without the smallest.

    pairs: int [pairs, 2].
    """
    members, places = np.unique(pairs, return_inverse=True)
    one, other = places.reshape(-1, 2).T
    component = _components(one, other, "weak")
    # Members are sorted, so the first of a component is its smallest.
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    smallest = members[first][component]
    joined = members != smallest
    return dict(zip(members[joined].tolist(), smallest[joined].tolist(), strict=True))


def _components(sources: np.ndarray, targets: np.ndarray, connection: str) -> np.ndarray:
    """Number of each node's component, int [nodes]."""
    nodes = 1 + max(sources.max(initial=-1), targets.max(initial=-1))
    graph = coo_array((np.ones(len(sources), bool), (sources, targets)), shape=(nodes, nodes))
    return connected_components(graph, connection=connection)[1]
