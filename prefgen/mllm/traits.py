"""Taste in words: from an MLLM's answer to two lists of traits, for the positive and the negative prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .prompt import AVOID_QUESTION, CLOSING_QUESTION

LIKES = r"\blikes?\b"
AVOIDS = r"\b(?:avoids?|dislikes?)\b"
LONGEST = 120  # characters of a trait


@dataclass(frozen=True)
class Traits:
    """What a user likes and dislikes in pictures, in the MLLM's words, most telling first.

    sure: how sure the MLLM was of a trait, in 0..1 (`Answer.sureness`); empty where nobody asked.
    """

    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    sure: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def positive(self) -> str:
        """For a positive prompt: "pastel palette, round shapes"."""
        return ", ".join(self.liked)

    @property
    def negative(self) -> str:
        """For a negative prompt."""
        return ", ".join(self.disliked)

    def to_json(self) -> str:
        """{"liked": [...], "disliked": [...]}."""
        return json.dumps({"liked": self.liked, "disliked": self.disliked}, ensure_ascii=False, indent=1)

    @classmethod
    def of_answers(cls, like: str, avoid: str = "") -> Traits:
        """From the answers to the closing question and to the one about what is avoided.

        A preference MLLM answers the first with "likes a, b or c ; avoids d, e", where "or" parts several tastes; any
        other MLLM with words of its own, which are taken as they are. What is liked is never named as disliked too.
        """
        before, after = _split_at(like, AVOIDS)
        liked = spoken(_sentence(_split_at(before, LIKES)[1] or before))
        avoided = (_split_at(avoid, AVOIDS)[1] or avoid) if avoid else after
        disliked = spoken(_sentence(avoided))
        return cls(liked, tuple(trait for trait in disliked if trait not in liked))

    @classmethod
    def asked(cls, answer: Callable[[str], str], disliked: bool) -> Traits:
        """From an MLLM's `answer` to a question about a history with or without disliked pictures.

        A trained preference MLLM says both in one answer; another one is asked again. Without disliked pictures nothing
        is said of them: it would be a guess.
        """
        like = answer(CLOSING_QUESTION)
        traits = cls.of_answers(like)
        if disliked and not traits.disliked:
            traits = cls.of_answers(like, answer(AVOID_QUESTION))
        return traits if disliked else cls(traits.liked, ())

    def lacks(self, disliked: bool) -> bool:
        """Whether these traits leave a side open that a history has pictures for. disliked: whether it has disliked
        ones; without them nothing is said of that side."""
        return not self.liked or (disliked and not self.disliked)

    def or_else(self, read: Callable[[], Traits], disliked: bool = True) -> Traits:
        """These traits, with a side that is empty taken from `read`, which is called only if it is needed."""
        if not self.lacks(disliked):
            return self
        other = read()
        return Traits(self.liked or other.liked, self.disliked or other.disliked, other.sure)

    @classmethod
    def typed(cls, liked: str, disliked: str) -> Traits:
        """From two prompts that an artist has written."""
        return cls(split(liked), split(disliked))


def spoken(text: str) -> tuple[str, ...]:
    """The traits of an MLLM's answer. What is longer than any trait is an MLLM that stutters ("no frame no frame ...")
    or talks about something else: as words in a prompt, or as what a user is trained to like, it would be nonsense."""
    return tuple(trait for trait in split(text) if len(trait) <= LONGEST)


def split(text: str) -> tuple[str, ...]:
    """Traits between commas, semicolons, lines and "or", each once, without full stops."""
    parts = (part.strip(" .:-*") for part in re.split(r"[,;\n]|\bor\b", text))
    return tuple(dict.fromkeys(part for part in parts if part))


def _sentence(text: str) -> str:
    """A text up to the end of its first sentence."""
    return re.split(r"\.\s", text, maxsplit=1)[0]


def _split_at(text: str, word: str) -> tuple[str, str]:
    """(what stands before the first match of a pattern, in any case; what stands behind it); (text, "") without one."""
    match = re.search(word, text, re.IGNORECASE)
    return (text[: match.start()], text[match.end() :]) if match else (text, "")
