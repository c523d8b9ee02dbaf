"""The atelier's sampler of histories: one user's liked pictures are of all of the user's tastes, in no order."""

import numpy as np

from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.users import user
from training.data.atelier_users import PoolSampler


def pool(count: int = 4000) -> np.ndarray:
    """Class numbers [count, families] of pictures with everything drawn uniformly."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(len(kinds), size=count) for kinds in FAMILIES.values()], 1)


def test_the_tastes_of_a_user_are_mixed_in_every_part_of_a_history():
    attributes = pool()
    sampler = PoolSampler(attributes)
    person = next(user(n) for n in range(1000) if len(user(n).tastes) == 2)
    columns = list(FAMILIES)
    fits = np.zeros((2, len(attributes)))
    for number, taste in enumerate(person.tastes):
        for family, name in taste.liked:
            index = [kind.name for kind in FAMILIES[family]].index(name)
            fits[number] += attributes[:, columns.index(family)] == index
    first_half, second_half = [], []
    for seed in range(60):
        shown, liked = sampler.history(person, 8, 8, np.random.default_rng(seed))
        of_first_taste = (fits[0] > fits[1])[shown[liked]]
        first_half += of_first_taste[:4].tolist()
        second_half += of_first_taste[4:].tolist()
    # In the order in which they are drawn, the first half would be of the first taste and the second of the other.
    assert abs(np.mean(first_half) - np.mean(second_half)) < 0.15
    assert 0.25 < np.mean(first_half + second_half) < 0.75
