"""Who is painted for, what is asked, and what words make of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefgen.atelier.world import scores, users
from prefgen.atelier.world.prompts import OPEN, Prompt, random_prompt
from prefgen.atelier.world.subjects import CLASS_OF, COMPANIONS, SETTINGS, SUBJECTS
from prefgen.atelier.world.users import Example, User

from .drawn import render_oracle
from .rows import PARTNERS

# Test users from here on are never used for a choice; those before it are what choices are made with.
FIRST_REPORTED = 50_000
PROMPTS = 24
EACH = 4  # prompts a user
HISTORY_SEED = 1
PROMPT_SEED = 24
# Of other users, how many are looked at for partners, and in how many pictures each.
CANDIDATES = 16
SCENES = 4


@dataclass(frozen=True)
class Request:
    """One picture. number: its place among all, which seeds its noise; user, prompt: places in the lists."""

    number: int
    user: int
    prompt: int


def reported_users(count: int) -> list[User]:
    """The users whom every figure is about."""
    return _test_users(FIRST_REPORTED, count)


def choosing_users(count: int) -> list[User]:
    """The users that a row is tuned with."""
    return _test_users(0, count)


def _test_users(first: int, count: int) -> list[User]:
    numbers = (number for number in itertools.count(first) if users.split(number) == "test")
    return [users.user(number) for number in itertools.islice(numbers, count)]


def heldout_prompts(count: int = PROMPTS) -> list[Prompt]:
    """Different prompts of the tests: as many closed ones as such with an open subject and with open company."""
    rng = np.random.default_rng(PROMPT_SEED)
    by_manner: dict[int, list[Prompt]] = {0: [], 1: [], 2: []}
    while min(map(len, by_manner.values())) < -(-count // 3):
        prompt = random_prompt(rng, heldout=True)
        own = by_manner[manner(prompt)]
        if prompt not in own:
            own.append(prompt)
    return [prompt for turn in zip(*by_manner.values(), strict=False) for prompt in turn][:count]


def manner(prompt: Prompt) -> int:
    """0 for a closed prompt, 1 for one with an open subject, 2 with open company or setting."""
    if prompt.subject == OPEN:
        return 1
    return 2 if OPEN in (prompt.setting, prompt.companion) else 0


def requests_of(people: int, prompts: int, each: int = EACH) -> list[Request]:
    """`each` prompts for every user, by turns all of them."""
    pairs = [(user, (user * each + i) % prompts) for user in range(people) for i in range(each)]
    return [Request(number, *pair) for number, pair in enumerate(pairs)]


def history_of(person: User, size: int) -> list[Example]:
    """So many liked and as many disliked pictures of a user; a longer history begins with the shorter one."""
    return users.history(person, size, size, HISTORY_SEED)


def partners_of(people: Sequence[User], user: int) -> list[int]:
    """PARTNERS other users whose true taste, drawn, suits this one as little more and as little less as chance."""
    rng = np.random.default_rng([HISTORY_SEED, people[user].id, 8])
    others = [other for other in range(len(people)) if other != user]
    looked_at = rng.permutation(others)[:CANDIDATES].tolist()
    overlaps = {other: abs(overlap(people[other], people[user], rng)) for other in looked_at}
    return sorted(looked_at, key=lambda other: (overlaps[other], other))[:PARTNERS]


def overlap(other: User, person: User, rng: np.random.Generator) -> float:
    """Mean alignment with one user of pictures that follow another's taste exactly."""
    prompts = [random_prompt(rng) for _ in range(SCENES)]
    return float(np.mean([scores.alignment(render_oracle(other, p, rng), person, p).all for p in prompts]))


def expected_overlap(people: Sequence[User], partners: Sequence[Sequence[int]]) -> float:
    """The mean alignment that users get from their partners' true tastes, drawn anew: what "mismatched" is beside."""
    rng = np.random.default_rng([HISTORY_SEED, 9])
    pairs = [(people[other], people[user]) for user, own in enumerate(partners) for other in own]
    return float(np.mean([overlap(other, person, rng) for other, person in pairs]))


def with_words(prompt: Prompt, words: Sequence[str]) -> tuple[str, list[str]]:
    """(the prompt, phrases to add to it) for a taste in words: subjects, settings and company fill the open slots that
    they fit, and nothing else; a look is added."""
    look = []
    for phrase in words:
        if phrase in _SLOTS:
            prompt = _filled(prompt, *_SLOTS[phrase])
        else:
            look.append(phrase)
    return prompt.text, look


def negative_words(prompt: Prompt, words: Sequence[str]) -> str:
    """A negative prompt: what is avoided, of subjects only those that would fill the prompt's open slot."""
    return ", ".join(w for w in words if w not in _SLOTS or _filled(prompt, *_SLOTS[w]) != prompt)


# What stands for content in a taste's words: {phrase: (field of the prompt, name)}.
_SLOTS = {
    phrase: (field, name)
    for field, phrases in (("subject", SUBJECTS), ("setting", SETTINGS), ("companion", COMPANIONS))
    for name, phrase in phrases.items()
    if phrase
}


def _filled(prompt: Prompt, field: str, name: str) -> Prompt:
    """The prompt with an open slot filled; the same where the slot isn't open or the name doesn't fit."""
    fits = field != "subject" or CLASS_OF[name] == prompt.kind
    return replace(prompt, **{field: name}) if getattr(prompt, field) == OPEN and fits else prompt
