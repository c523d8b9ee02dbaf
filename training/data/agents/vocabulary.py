"""What a picture can be made of: attributes in families, pairs that exclude each other, and what prompts ask for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from prefgen.atelier import captions
from prefgen.atelier.attributes import FAMILIES
from prefgen.files import TextError, read_text

from ..errors import DataError
from ..schema import TEST, TRAIN, prompt_split

REAL_WORLD = Path(__file__).with_name("vocabulary.json")


@dataclass(frozen=True)
class Vocabulary:
    """Attributes in the order of their families; an attribute is named by its index or by "family/name".

    phrases: how a prompt says each attribute. families: (start, stop) of each family, one attribute of which a picture
    shows at most. excludes: for each attribute, those of other families that can't be in one picture with it.
    prompts: {TRAIN, TEST} -> (key, prompt) of what is asked for; `key` is for the renderer.
    """

    name: str
    version: str
    keys: tuple[str, ...]
    phrases: tuple[str, ...]
    families: tuple[tuple[int, int], ...]
    excludes: tuple[frozenset[int], ...]
    prompts: dict[str, tuple[tuple[str, str], ...]]
    every_family: bool  # a picture always shows one attribute of each family

    @cached_property
    def index(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.keys)}

    @cached_property
    def family_of(self) -> np.ndarray:
        """Number of each attribute's family, int64 [attributes]."""
        return np.repeat(np.arange(len(self.families)), [stop - start for start, stop in self.families])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, which a data set's configuration records."""
        content = [self.keys, self.phrases, sorted(map(sorted, self.excludes)), self.prompts, self.every_family]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@lru_cache(maxsize=1)
def atelier() -> Vocabulary:
    """The atelier's ten families; its held-out prompts are the test prompts."""
    attributes = [a for family in FAMILIES.values() for a in family]
    prompts = {
        part: tuple((f"{subject}/{prop}", captions.neutral(subject, prop)) for subject, prop in pairs)
        for part, pairs in ((TRAIN, captions.train_prompts()), (TEST, captions.heldout_prompts()))
    }
    return Vocabulary(
        "atelier",
        "1",
        tuple(f"{a.family}/{a.name}" for a in attributes),
        tuple(a.phrase for a in attributes),
        _ranges([len(family) for family in FAMILIES.values()]),
        (frozenset(),) * len(attributes),
        prompts,
        every_family=True,
    )


@lru_cache(maxsize=4)
def load(path: Path = REAL_WORLD) -> Vocabulary:
    """Read a vocabulary file (docs/vocabulary.md describes it). DataError when it doesn't hold together."""
    try:
        content = json.loads(read_text(path))
        families, subjects = content["families"], content["subjects"]
        keys = [f"{family}/{name}" for family, names in families.items() for name in names]
        phrases = [name for names in families.values() for name in names]
        pairs = [tuple(pair) for pair in content["excludes"]]
        name, version = content["name"], content["version"]
    except OSError as error:
        raise DataError(f"Can't read the vocabulary {path}: {error.strerror}.") from error
    except TextError as error:
        raise DataError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no vocabulary ({error}): it needs name, version, families, excludes, subjects."
        ) from error
    index = {key: i for i, key in enumerate(keys)}
    double = sorted({key for key in keys if keys.count(key) > 1} | {p for p in phrases if phrases.count(p) > 1})
    if double:
        raise DataError(f"{path} names {double[0]!r} twice: an attribute belongs to one family, once.")
    excludes = [set() for _ in keys]
    for pair in pairs:
        unknown = [key for key in pair if key not in index]
        if unknown or len(pair) != 2:
            raise DataError(f"{path} excludes {pair}: name two attributes of the families, as 'family/name'.")
        one, two = (index[key] for key in pair)
        excludes[one].add(two)
        excludes[two].add(one)
    prompts = {
        part: tuple((subject, subject) for subject in subjects if prompt_split(subject) == part)
        for part in (TRAIN, TEST)
    }
    if len(families) < 6 or not all(families.values()) or len(keys) < 50 or not all(prompts.values()):
        needed = "at least 6 families (none empty), 50 attributes and about 30 subjects are needed"
        raise DataError(f"{path} is too small: {needed}.")
    return Vocabulary(
        name,
        version,
        tuple(keys),
        tuple(phrases),
        _ranges([len(names) for names in families.values()]),
        tuple(frozenset(e) for e in excludes),
        prompts,
        every_family=False,
    )


def _ranges(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    stops = np.cumsum(sizes).tolist()
    return tuple(zip([0, *stops[:-1]], stops, strict=True))
