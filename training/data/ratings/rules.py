"""From ratings to histories: verdicts by each user's own scale, choices by net wins, held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..schema import DISLIKED, LIKED, normal_prompt, prompt_split, split, user_split
from .rating import (
    CHOICES,
    CONTRADICTORY,
    EVEN,
    FAULTY,
    FEW,
    FLAT,
    NEUTRAL,
    OLDER,
    REPEATED,
    SAME,
    SCORES,
    SURPLUS,
    VERDICTS,
    Dropped,
    Key,
    Rating,
    Source,
)


@dataclass(frozen=True)
class Limits:
    """What a person may set. margin: scores nearer than this to a user's mean are neutral, in that user's standard
    deviations."""

    min_liked: int = 4
    min_disliked: int = 4
    heldout: int = 1  # pairs a user, as far as the minimum stays
    ratio: float = 1.8  # of a history's larger side to its smaller; 0 for no limit
    margin: float = 0.25


@dataclass
class Judged:
    """A picture of a user. picture: SHA-256 of its bytes; clarity: how far from neutral; first, last: places of its
    ratings among the user's, oldest first; choices: the choices that it took part in."""

    picture: str
    image: Key
    liked: bool
    clarity: float
    first: int
    last: int
    choices: frozenset[int] = frozenset()
    prompt: str = ""
    split: str = ""
    heldout: bool = False

    @property
    def verdict(self) -> str:
        """LIKED or DISLIKED."""
        return LIKED if self.liked else DISLIKED


@dataclass
class Person:
    """A user of the new set: their number, the name in the source, the history, and held-out (liked, disliked)."""

    number: int
    name: str
    pictures: list[Judged]
    pairs: list[tuple[Judged, Judged]] = field(default_factory=list)


def decide(source: Source, pictures: Mapping[Key, str | None], limits: Limits) -> tuple[list[Person], list[Dropped]]:
    """(the users with enough on both sides, in the order of their names; what was dropped on the way).

    pictures: SHA-256 of every sound picture's bytes, None for a faulty one.
    """
    dropped: list[Dropped] = []
    standing = _standing(source, pictures, dropped)
    prompts: dict[str, str] = {}
    for ratings in standing.values():
        for rating in ratings:
            # A picture has one prompt for everybody, the first that is named: else it could be in train and in test.
            digest = pictures[rating.image] or ""
            prompts[digest] = prompts.get(digest) or rating.prompt
    people = []
    for name in sorted(standing):
        judged = _judged(name, standing[name], source.scale, pictures, limits.margin, dropped)
        sides = [sum(each.liked == liked for each in judged) for liked in (True, False)]
        if sides[0] < limits.min_liked or sides[1] < limits.min_disliked:
            dropped.append(Dropped(FEW, user=name))
            continue
        person = Person(len(people), name, judged)
        for each in judged:
            each.prompt = prompts[each.picture]
            each.split = split(user_split(person.number), _prompt_split(each))
        person.pairs = _hold_out(judged, limits)
        person.pictures = _without_surplus(name, judged, limits.ratio, dropped)
        people.append(person)
    return people, dropped


def _standing(source: Source, pictures: Mapping[Key, str | None], dropped: list[Dropped]) -> dict[str, list[Rating]]:
    """{user: ratings, oldest first} of sound pictures. Those without a time stand in the order of the source."""
    sides: dict[int, list[str | None]] = {}
    for rating in source.ratings:
        sides.setdefault(rating.choice, []).append(pictures[rating.image])
    standing: dict[str, list[Rating]] = {}
    for rating in source.ratings:
        shown = sides[rating.choice] if rating.choice >= 0 else [pictures[rating.image]]
        rule = FAULTY if None in shown else SAME if len(shown) == 2 and shown[0] == shown[1] else None
        if rule:
            # The two pictures of a choice come one after the other, and are one row.
            row = Dropped(rule, rating.place, user=rating.user)
            dropped += [row] if dropped[-1:] != [row] else []
        else:
            standing.setdefault(rating.user, []).append(rating)
    for ratings in standing.values():
        if all(rating.time is not None for rating in ratings):
            ratings.sort(key=lambda rating: rating.time or 0.0)
    return standing


def _judged(
    name: str,
    ratings: list[Rating],
    scale: str,
    pictures: Mapping[Key, str | None],
    margin: float,
    dropped: list[Dropped],
) -> list[Judged]:
    """One user's pictures with a verdict, in the order in which they were first rated."""
    groups: dict[str, list[tuple[int, Rating]]] = {}
    for place, rating in enumerate(ratings):
        groups.setdefault(pictures[rating.image] or "", []).append((place, rating))
    values = {}
    for digest, group in groups.items():
        value = sum(rating.value for _, rating in group) if scale == CHOICES else _merged(group, scale, dropped)
        if value is not None:
            values[digest] = value
        else:
            dropped.append(Dropped(CONTRADICTORY, picture=digest, user=name))
    if scale == SCORES:
        values = _on_own_scale(name, values, margin, dropped)
    judged = []
    for digest, value in values.items():
        if value == 0:
            dropped.append(Dropped(EVEN if scale == CHOICES else NEUTRAL, picture=digest, user=name))
            continue
        places = [place for place, _ in groups[digest]]
        choices = frozenset(rating.choice for _, rating in groups[digest]) - {-1}
        image = groups[digest][0][1].image
        judged.append(Judged(digest, image, value > 0, abs(value), min(places), max(places), choices))
    return sorted(judged, key=lambda each: each.first)


def _merged(group: list[tuple[int, Rating]], scale: str, dropped: list[Dropped]) -> float | None:
    """The value of one picture of a user who rated it once or several times; None where verdicts contradict."""
    ratings = [rating for _, rating in group]
    last = ratings[-1]
    earlier = ratings[:-1]
    if all(rating.time is not None for rating in ratings):
        rules = [REPEATED if rating.value == last.value else OLDER for rating in earlier]
    elif scale == VERDICTS and len({rating.value for rating in ratings}) > 1:
        return None
    else:
        rules = [REPEATED] * len(earlier)
    dropped += [Dropped(rule, rating.place, user=rating.user) for rule, rating in zip(rules, earlier, strict=True)]
    return last.value if OLDER in rules else float(np.mean([rating.value for rating in ratings]))


def _on_own_scale(name: str, values: Mapping[str, float], margin: float, dropped: list[Dropped]) -> dict[str, float]:
    """Scores as distances from the user's own mean, in the user's own standard deviations; 0 within the margin.

    People use a scale of 1 to 5 in their own ways: for one 3 is praise, for another a rebuke.
    """
    scores = np.array(list(values.values()))
    if not len(scores) or scores.std() == 0:
        dropped.append(Dropped(FLAT, user=name))
        return {}
    distances = (scores - scores.mean()) / scores.std()
    distances[np.abs(distances) < margin] = 0
    return dict(zip(values, distances.tolist(), strict=True))


def _prompt_split(judged: Judged) -> str:
    """TRAIN or TEST of a picture's prompt. Without one its bytes decide: such pictures aren't all of one prompt."""
    return prompt_split(judged.prompt if normal_prompt(judged.prompt) else f"picture {judged.picture}")


def _hold_out(judged: list[Judged], limits: Limits) -> list[tuple[Judged, Judged]]:
    """So many (liked, disliked) pictures of one split, no picture twice, the latest first: those of one choice, then
    those of one prompt, then any. What else than the taste sets two pictures apart makes a question less fair."""
    room = min(
        sum(each.liked for each in judged) - limits.min_liked,
        sum(not each.liked for each in judged) - limits.min_disliked,
        limits.heldout,
    )
    newest = sorted(judged, key=lambda each: each.last, reverse=True)
    pairs: list[tuple[Judged, Judged]] = []
    for kin in (_choices, _prompt, _any):
        disliked: dict[tuple, list[Judged]] = {}
        for each in newest:
            for key in kin(each) if not each.liked else ():
                disliked.setdefault(key, []).append(each)
        for each in filter(lambda each: each.liked and not each.heldout, newest):
            if len(pairs) >= room:
                return pairs
            others = (other for key in kin(each) for other in disliked.get(key, ()) if not other.heldout)
            if partner := next(others, None):
                each.heldout = partner.heldout = True
                pairs.append((each, partner))
    return pairs


def _choices(each: Judged) -> list[tuple]:
    return [(each.split, choice) for choice in sorted(each.choices, reverse=True)]


def _prompt(each: Judged) -> list[tuple]:
    return [(each.split, normal_prompt(each.prompt))]


def _any(each: Judged) -> list[tuple]:
    return [(each.split,)]


def _without_surplus(name: str, judged: list[Judged], ratio: float, dropped: list[Dropped]) -> list[Judged]:
    """The history with its larger side cut to `ratio` times the smaller; the clearest stay, then the latest."""
    sides = [[each for each in judged if each.liked == liked and not each.heldout] for liked in (True, False)]
    most = int(ratio * min(map(len, sides)))
    if not ratio or not most:
        return judged
    surplus = set()
    for side in sides:
        ranked = sorted(side, key=lambda each: (each.clarity, each.last), reverse=True)
        surplus |= {each.picture for each in ranked[most:]}
    dropped += [Dropped(SURPLUS, picture=digest, user=name) for digest in sorted(surplus)]
    return [each for each in judged if each.picture not in surplus]
