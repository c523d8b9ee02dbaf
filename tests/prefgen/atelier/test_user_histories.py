"""What simulated users' histories show, counted against the rules that they are drawn by."""

import numpy as np
import pytest

from prefgen.atelier import users
from prefgen.atelier.attributes import FAMILIES

PEOPLE = [users.user(number) for number in range(80)]
EACH = 12


@pytest.fixture(scope="module")
def examples():
    """(person, attributes of a picture as a set, liked) of many pictures."""
    return [
        (person, set(example.scene.attributes), example.liked)
        for person in PEOPLE
        for example in users.history(person, EACH, EACH, 3)
    ]


def test_a_disliked_picture_shows_most_of_what_is_disliked_and_two_of_it_at_least(examples):
    shares = []
    for person, shown, liked in examples:
        if not liked:
            present = shown & set(person.disliked)
            shares.append(len(present) / len(person.disliked))
            assert len(present) >= 2
    # 0.8 by will; of what is left out chance shows one in five or so.
    assert np.mean(shares) == pytest.approx(0.84, abs=0.03)


def test_a_liked_picture_follows_one_taste_and_shows_nothing_disliked(examples):
    shares = []
    for person, shown, liked in examples:
        if liked:
            assert not shown & set(person.disliked)
            shares.append(max(len(shown & set(taste.liked)) / len(taste.liked) for taste in person.tastes))
    # 0.9 by will, and one in five or so of the rest by chance.
    assert np.mean(shares) == pytest.approx(0.92, abs=0.02)


def test_liked_attributes_are_rarer_than_by_chance_in_disliked_pictures(examples):
    seen, expected = 0, 0.0
    for person, shown, liked in examples:
        if liked:
            continue
        families = {family for family, _ in person.disliked}
        for family, name in {pair for taste in person.tastes for pair in taste.liked}:
            if family not in families:
                seen += (family, name) in shown
                expected += 1 / len(FAMILIES[family])
    assert 0.35 < seen / expected < 0.65, "half as often"


def test_both_tastes_of_a_user_come_up_and_prompts_are_those_of_training():
    person = next(p for p in PEOPLE if len(p.tastes) == 2)
    drawn = users.history(person, 30, 0, 1)
    fits = [[len(set(e.scene.attributes) & set(taste.liked)) for taste in person.tastes] for e in drawn]
    firsts = sum(a > b for a, b in fits)
    assert 6 < firsts < 24
    assert len({e.prompt for e in drawn}) > 10
