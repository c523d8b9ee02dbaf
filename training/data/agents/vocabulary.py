"""What a picture can be made of: attributes in families, pairs that exclude each other, and what prompts ask for."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError, model_validator

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
        """{"family/name": index}."""
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
    attributes = [attribute for family in FAMILIES.values() for attribute in family]

    def prompts(pairs) -> tuple[tuple[str, str], ...]:
        return tuple((f"{subject}/{prop}", captions.neutral(subject, prop)) for subject, prop in pairs)

    return Vocabulary(
        name="atelier",
        version="1",
        keys=tuple(f"{attribute.family}/{attribute.name}" for attribute in attributes),
        phrases=tuple(attribute.phrase for attribute in attributes),
        families=_ranges([len(family) for family in FAMILIES.values()]),
        excludes=(frozenset(),) * len(attributes),
        prompts={TRAIN: prompts(captions.train_prompts()), TEST: prompts(captions.heldout_prompts())},
        every_family=True,
    )


@lru_cache(maxsize=4)
def load(path: Path = REAL_WORLD) -> Vocabulary:
    """Read a vocabulary file (docs/vocabulary.md describes it). DataError when it doesn't hold together."""
    try:
        file = VocabularyFile.model_validate_json(read_text(path))
    except OSError as error:
        raise DataError(f"Can't read the vocabulary {path}: {error.strerror}.") from error
    except TextError as error:
        raise DataError(str(error)) from error
    except ValidationError as error:
        raise DataError(f"{path} {_sentence(error)}.") from error
    index = {key: i for i, key in enumerate(file.keys)}
    excludes: list[set[int]] = [set() for _ in file.keys]
    for one, other in file.excludes:
        excludes[index[one]].add(index[other])
        excludes[index[other]].add(index[one])
    return Vocabulary(
        name=file.name,
        version=file.version,
        keys=tuple(file.keys),
        phrases=tuple(phrase for names in file.families.values() for phrase in names),
        families=_ranges([len(names) for names in file.families.values()]),
        excludes=tuple(map(frozenset, excludes)),
        prompts={split: tuple((subject, subject) for subject in file.prompts(split)) for split in (TRAIN, TEST)},
        every_family=False,
    )


class VocabularyFile(BaseModel):
    """A vocabulary file as docs/vocabulary.md describes it."""

    name: str
    version: str
    families: dict[str, list[str]]
    excludes: list[tuple[str, str]]
    subjects: list[str]

    @property
    def keys(self) -> list[str]:
        """ "family/name" of every attribute."""
        return [f"{family}/{name}" for family, names in self.families.items() for name in names]

    def prompts(self, split: str) -> list[str]:
        """The subjects of TRAIN or TEST."""
        return [subject for subject in self.subjects if prompt_split(subject) == split]

    @model_validator(mode="after")
    def holds_together(self) -> VocabularyFile:
        phrases = [phrase for names in self.families.values() for phrase in names]
        keys = set(self.keys)
        counts = Counter([*self.keys, *phrases])
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"names {repeated[0]!r} twice: an attribute belongs to one family, once")
        for pair in self.excludes:
            if not keys.issuperset(pair):
                raise ValueError(f"excludes {pair}: name two attributes of the families, as 'family/name'")
        needed = "at least 6 families (none empty), 50 attributes and about 30 subjects are needed"
        enough_families = len(self.families) >= 6 and all(self.families.values())
        if not enough_families or len(phrases) < 50 or not self.prompts(TRAIN) or not self.prompts(TEST):
            raise ValueError(f"is too small: {needed}")
        return self


def _sentence(error: ValidationError) -> str:
    """The first fault in words, to follow the file's name."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    entry = ".".join(map(str, fault["loc"]))
    reason = f"{entry}: {message}" if entry else message
    return f"is no vocabulary ({reason}): it needs name, version, families, excludes, subjects"


def _ranges(sizes: list[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of families of these sizes, one after the other."""
    stops = np.cumsum(sizes).tolist()
    return tuple(zip([0, *stops[:-1]], stops, strict=True))
