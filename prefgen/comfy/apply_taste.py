"""Apply Taste: the four nodes in one, by the same functions as they, with what fits the connected model.

What was read of a taste is remembered by the files that it was read from, so that moving the strength loads nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ..adapter import FLUX, AdapterHeader
from ..adapter_checks import check_encoded
from ..adapter_file import load_adapter_once
from ..encoded import EncodedPreference
from ..files import file_state
from ..fusion import fuse_user
from ..history import PreferenceHistory
from ..lru import LeastRecentlyUsed
from ..mllm.traits import Traits
from . import folders, histories, provenance, readers, tastes
from .auto import AUTO, WORDS, Choice, Request, choose, header_of
from .encoding import describe_history, encode_history
from .patcher import apply_user

REMEMBERED = 16
# (fingerprint of the taste, of the MLLM, of the CLIP vision model) -> EncodedPreference, and -> WordsRead.
_encodings: LeastRecentlyUsed = LeastRecentlyUsed(REMEMBERED)
_words: LeastRecentlyUsed = LeastRecentlyUsed(REMEMBERED)


@dataclass(frozen=True)
class Defaults:
    """How an adapter is applied at strength 1."""

    weight: float
    blocks: str


LEARNT = Defaults(1.0, "all")
# An IP-Adapter was trained to give its picture again. For a taste only the blocks of style are used, as InstantStyle
# found them (arXiv 2404.02733), and less than the 0.8 that IPAdapter_plus advises for one picture. How much dislikes
# count (push 0.5) is Fuse User Vector's own default. Neither number has been measured on people's tastes.
PICTURES = Defaults(0.7, "style")
# Nobody has found the blocks of style of Flux; 0.7 is what XLabs' own examples use.
FLUX_PICTURES = Defaults(0.7, "all")


class Applied(NamedTuple):
    """The model, the words for both prompts ("" where an adapter fits), and what was chosen, for the artist."""

    model: ModelPatcher
    positive_words: str
    negative_words: str
    chosen: str


class WordsRead(NamedTuple):
    """A taste in words, its name, and the MLLM's revision."""

    traits: Traits
    taste: str
    revision: str


def apply_taste(
    model: ModelPatcher,
    taste: str,
    strength: float,
    request: Request,
    attn_mask: torch.Tensor | None = None,
    item_weights: str = "",
) -> Applied:
    """A taste, by its combo entry, on a model. strength: 1 is what the adapter is made for, 0 reads nothing; words are
    the same at any other strength. attn_mask, item_weights: as for `apply_user`. Raises ValueError with one
    sentence."""
    if strength == 0:
        provenance.note(None)
        return Applied(model, "", "", "Strength 0: the taste is left out.")
    choice = choose(model, request)
    if choice.adapter is None:
        return _in_words(model, taste, choice)
    path = folders.adapter_path(choice.adapter)
    defaults = defaults_of(header_of(path))
    encoded = _encoded(taste, choice)
    adapter = load_adapter_once(path)
    check_encoded(adapter.header, encoded)
    user = fuse_user(adapter, encoded)
    weight = strength * defaults.weight
    patched = apply_user(model, user, weight, attn_mask=attn_mask, blocks=defaults.blocks, item_weights=item_weights)
    provenance.note(user, weight)
    said = [
        f"taste: {encoded.taste}",
        f"adapter: {choice.adapter} ({adapter.digest[: provenance.DIGITS]})",
        *_readers_in_words(choice, encoded),
        f"weight: {weight:.3g}, blocks: {defaults.blocks}",
        f"user: {user.digest[: provenance.DIGITS]}",
    ]
    return Applied(patched, "", "", "\n".join(said))


def defaults_of(header: AdapterHeader) -> Defaults:
    """How an adapter of a kind is applied."""
    if header.kind != "ip_adapter":
        return LEARNT
    return FLUX_PICTURES if header.base_family == FLUX else PICTURES


def fingerprint(taste: str, request: Request) -> str:
    """Changes with everything on the disk that `apply_taste` may read for this request."""
    lines = [folders.history_fingerprint(taste), repr(request)]
    for name in sorted(folders.adapters()) if request.adapter == AUTO else [request.adapter]:
        if name != WORDS:
            path = folders.adapter_path(name)
            lines.append(f"{name} {file_state(path) if path.is_file() else None}")
    for name in sorted(folders.clip_visions()) if request.clip_vision == AUTO else [request.clip_vision]:
        lines.append(f"{readers.clip_vision_key(name)}")
    loras = sorted(folders.mllm_loras())
    for name in sorted(folders.mllms()) if request.mllm == AUTO else [request.mllm]:
        lines += [f"{readers.mllm_key(name, lora)}" for lora in loras]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def _encoded(taste: str, choice: Choice) -> EncodedPreference:
    """The taste as Encode Preference History reads it, without prompts."""
    key = (folders.history_fingerprint(taste), *_key(choice))
    if key not in _encodings:
        history = _history(taste)
        mllm = readers.load_mllm(choice.mllm, choice.lora) if choice.mllm else None
        clip_vision = readers.load_clip_vision(choice.clip_vision) if choice.clip_vision else None
        _encodings[key] = encode_history(history, mllm, clip_vision)
    return _encodings[key]


def _in_words(model: ModelPatcher, taste: str, choice: Choice) -> Applied:
    """The taste as Describe Preference says it; the model stays as it is."""
    assert choice.mllm is not None
    key = (folders.history_fingerprint(taste), *_key(choice))
    if key not in _words:
        history = _history(taste)
        managed = readers.load_mllm(choice.mllm, choice.lora)
        traits = describe_history(history, managed)
        name = histories.name_of(history)
        tastes.understood(traits, tastes.chosen(tastes.AUTO, name))
        _words[key] = WordsRead(traits, name, managed.mllm.fingerprint["revision"])
    words = _words[key]
    traits = tastes.in_its_words(words.traits, tastes.chosen(tastes.AUTO, words.taste))
    mllm = f"{choice.mllm} ({words.revision[: provenance.DIGITS]})"
    provenance.note(None, words={"taste": words.taste, "words": traits.positive, "mllm": mllm})
    said = [f"taste: {words.taste}, in words", f"MLLM: {mllm}", *([choice.reason] if choice.reason else [])]
    return Applied(model, traits.positive, traits.negative, "\n".join(said))


def _history(taste: str) -> PreferenceHistory:
    loaded = histories.load(folders.history_of(taste))
    return PreferenceHistory.from_images(loaded.liked, loaded.disliked)


def _key(choice: Choice) -> tuple:
    """Of the models that read, as their files are now."""
    mllm = readers.mllm_key(choice.mllm, choice.lora) if choice.mllm else None
    return mllm, readers.clip_vision_key(choice.clip_vision) if choice.clip_vision else None


def _readers_in_words(choice: Choice, encoded: EncodedPreference) -> list[str]:
    """The models that read the pictures, by name and checksum."""
    said = []
    if choice.mllm:
        lora = "" if choice.lora == folders.NO_LORA else f", LoRA {choice.lora}"
        said.append(f"MLLM: {choice.mllm} ({encoded.mllm['revision'][: provenance.DIGITS]}{lora})")
    if choice.clip_vision:
        digest = encoded.clip_vision.get("digest", "")[: provenance.DIGITS]
        said.append(f"CLIP vision: {choice.clip_vision}" + (f" ({digest})" if digest else ""))
    return said
