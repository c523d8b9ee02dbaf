"""The second edition's simulated users, as `training.atelier.world.people` wrote them.

To every stage they are a data set. But they are known completely by their numbers, which two teachers of the branch
make use of: what words can say of a taste for one prompt, and what trait tokens can.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product

import numpy as np
import torch

from prefgen.atelier.world import users
from prefgen.atelier.world.labels import CLASSES
from prefgen.atelier.world.prompts import OPEN, Prompt
from prefgen.atelier.world.subjects import CLASS_OF, COMPANIONS, NUMBERS, SETTINGS, SUBJECTS
from prefgen.atelier.world.tastes import Said, avoided_text, disliked_of, enriched_text, liked_of
from prefgen.atelier.world.traits import CONTINUOUS

from .trait_tokens import TraitLabels
from .worlds import DataSetWorld, History, Target

# What a picture shows beside its look; a look's attributes are words of prompts already.
CONTENT = {"subject": SUBJECTS, "setting": SETTINGS, "companion": COMPANIONS}


class PeopleWorld(DataSetWorld):
    """A set of the second edition's users. Its pictures' prompts are the world's own."""

    def phrase(self, attribute: int) -> str:
        return self.phrase_of(self.attributes[attribute])

    def phrase_of(self, name: str) -> str:
        """How prompts say "family/name": a subject with its article, a setting with its preposition."""
        family, _, words = name.partition("/")
        return CONTENT.get(family, {}).get(words, words)

    def history(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> History:
        """As of any set, but one picture of each verdict stays out, for questions about one that the history doesn't
        show."""
        most = [max(1, len(self._history_rows(user, verdict)) - 1) for verdict in (True, False)]
        return super().history(user, rng, min(liked, most[0]), min(disliked, most[1]))

    def others(self, user: int, rng: np.random.Generator, history: History) -> History:
        everything = len(self._rows[user])
        return super().history(user, rng, everything, everything)

    def person(self, user: int) -> users.User:
        """The simulated user of a number, as the renderer draws for them."""
        if user not in self._drawn:
            self._drawn[user] = users.user(user)
        return self._drawn[user]

    @cached_property
    def _drawn(self) -> dict[int, users.User]:
        return {}

    def prompt_object(self, text: str) -> Prompt:
        """The prompt that a picture's words are. KeyError for other words."""
        return self._prompts[text]

    @cached_property
    def _prompts(self) -> dict[str, Prompt]:
        subjects = [*CLASS_OF.items(), *((OPEN, kind) for kind in dict.fromkeys(CLASS_OF.values()))]
        slots = product(subjects, NUMBERS, [*SETTINGS, OPEN], [*COMPANIONS, OPEN])
        prompts = [Prompt(kind, subject, *rest) for (subject, kind), *rest in slots]
        return {prompt.text: prompt for prompt in prompts}

    def _target_of(self, user: int, number: int) -> Target:
        text = self.prompt(number)
        person = self.person(user)
        taste = self._taste_shown(user, number)
        prompt = self.prompt_object(text)
        # Words are hidden where a set's attributes are.
        enriched = enriched_text(person, person.tastes[taste], prompt) if self.attributes else None
        return Target(number, text, enriched, avoided_text(person, prompt) if self.attributes else None, taste)

    def _taste_shown(self, user: int, number: int) -> int:
        """Which of a user's tastes a liked picture was made to show: the one that more of its attributes say."""
        tastes = self._people[user]["tastes"] or [[]]
        shown = set(self.index["attributes"][number].as_py() or ())
        return max(range(len(tastes)), key=lambda i: sum(opinion["attribute"] in shown for opinion in tastes[i]))

    def liked_labels(self, user: int, target: Target) -> TraitLabels:
        """What trait tokens say of what the user likes where this was asked for; nothing without a prompt."""
        person = self.person(user)
        if not target.prompt:
            return labels_of(Said())
        return labels_of(liked_of(person, person.tastes[target.taste], self.prompt_object(target.prompt)))

    def disliked_labels(self, user: int, target: Target) -> TraitLabels:
        """The same of what the user dislikes."""
        if not target.prompt:
            return labels_of(Said())
        return labels_of(disliked_of(self.person(user), self.prompt_object(target.prompt)))


def labels_of(said: Said) -> TraitLabels:
    """What is said of a scene as the numbers of trait tokens."""
    classes = torch.zeros(len(CLASSES), dtype=torch.int64)
    values = torch.zeros(len(CONTINUOUS))
    names = [name in said.kinds for name in CLASSES] + [name in said.values for name in CONTINUOUS]
    for i, (name, kinds) in enumerate(CLASSES.items()):
        if name in said.kinds:
            classes[i] = kinds.index(said.kinds[name])
    for i, (name, trait) in enumerate(CONTINUOUS.items()):
        if name in said.values:
            values[i] = trait.share(said.values[name])
    return TraitLabels(classes, values, torch.tensor(names))
