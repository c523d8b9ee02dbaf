"""How a folder says that conversations are written and pictures normalised.

Which of its files counts is what transformers 5 makes of them (`ProcessorMixin.get_processor_dict` and
`ImageProcessingMixin.get_image_processor_dict` of 5.20). Versions before it have other orders, which differ among
themselves; one folder must mean one conversation wherever it is read, so that order is kept with all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from .files import MLLMError, read_json
from .prompt import CLOSING_QUESTION

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
WRAPPED_TEMPLATE = "chat_template.json"
PLAIN_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT = "default"


def preprocessor_of(folder: Path) -> dict:
    """How the folder's image processor is set: `image_processor` in processor_config.json, where transformers 5 saves
    it, else preprocessor_config.json; empty if it has neither."""
    nested = (_file(folder, PROCESSOR) or {}).get("image_processor")
    settings = nested if nested is not None else _file(folder, PREPROCESSOR)
    if settings is None:
        return {}
    name = PREPROCESSOR if nested is None else PROCESSOR
    if not isinstance(settings, dict) or not _plausible(settings):
        raise MLLMError(f"{name} of the MLLM folder {folder.name} is damaged: download it again.")
    return settings


def chat_template_of(folder: Path, tokenizer) -> str | None:
    """The chat template that transformers' processor of this folder has, else the tokenizer's own, else None.

    Of several by name it is the one named "default". Raises MLLMError with one sentence if there is none of that name
    or the files contradict each other.
    """
    processors = (_file(folder, PROCESSOR) or {}).get("chat_template")
    if processors is not None:
        return _default(processors, PROCESSOR, folder)
    more = folder / MORE_TEMPLATES
    others = sorted(more.glob("*.jinja")) if more.is_dir() else []
    wrapped = _file(folder, WRAPPED_TEMPLATE)
    if wrapped is not None:
        if others:
            raise MLLMError(
                f"The MLLM folder {folder.name} has {WRAPPED_TEMPLATE} and {MORE_TEMPLATES}, which transformers "
                f"refuses together: keep the one that its MLLM was released with, and delete the other."
            )
        return _default(wrapped.get("chat_template"), WRAPPED_TEMPLATE, folder)
    if (folder / PLAIN_TEMPLATE).is_file():
        return _text(folder / PLAIN_TEMPLATE, folder)
    if others:
        named = {file.stem: file for file in others}
        if DEFAULT not in named:
            raise MLLMError(_nameless(MORE_TEMPLATES, folder))
        return _text(named[DEFAULT], folder)
    own = getattr(tokenizer, "chat_template", None)
    return _default(own, "tokenizer_config.json", folder) if own else None


def check_conversation(mllm) -> None:
    """Write a small conversation by the chat template and see that it is all there, in order: every picture as one
    image token, every verdict, the question. Raises MLLMError with one sentence for a template that writes another."""
    if not getattr(mllm.tokenizer, "chat_template", None):
        return
    image_token = mllm.image_token
    try:
        text = mllm.conversation([(True, "a boat"), (False, "")], CLOSING_QUESTION)
    except ImportError as error:
        raise MLLMError(f"The chat template of {mllm.name} needs jinja2: pip install jinja2.") from error
    except Exception as error:
        # A template is a program, and raises what it likes.
        raise MLLMError(_for_text_alone(mllm.name)) from error
    expected = [image_token, "liked (a boat)", image_token, "disliked", CLOSING_QUESTION]
    in_order = re.search(".*?".join(map(re.escape, expected)), text, re.DOTALL)
    if "{'type'" in text or text.count(image_token) != 2 or not in_order:
        raise MLLMError(_for_text_alone(mllm.name))


def reading_digest(mllm) -> str:
    """sha256 of how histories reach this MLLM beside its weights: a conversation as text and as token ids, the size of
    pictures and how they are normalised. The same settings in other files give the same digest."""
    items = [(True, "a boat at sunset, 35mm"), (False, ""), (True, "Ein Café, 夜")]
    family = mllm.family
    reading = {
        "text": mllm.conversation(items, CLOSING_QUESTION, 1),
        "ids": mllm.token_ids(items, CLOSING_QUESTION, 1),
        "image": [family.image_size, family.tokens_per_image, *family.mean, *family.std],
    }
    return hashlib.sha256(json.dumps(reading, sort_keys=True).encode()).hexdigest()


def _plausible(settings: dict) -> bool:
    """Whether what is read of an image processor's settings has the types that transformers writes."""
    sizes = settings.get("size") or {}
    numbers = [settings.get(key) for key in ("min_pixels", "max_pixels", "rescale_factor")]
    numbers += [*sizes.values()] if isinstance(sizes, dict) else [sizes]
    numbers = [number for number in numbers if number is not None]
    for key in ("image_mean", "image_std"):
        values = settings.get(key)
        if values is not None and not isinstance(values, (int, float)):
            if not isinstance(values, list) or len(values) != 3:
                return False
            numbers += values
    spread = settings.get("image_std")
    if spread is not None and 0 in (spread if isinstance(spread, list) else [spread]):
        return False
    return all(isinstance(number, (int, float)) and math.isfinite(number) and number >= 0 for number in numbers)


def _default(template, name: str, folder: Path) -> str:
    """The template to use of what a file says: one text, or several by name, in either of transformers' ways."""
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, Mapping):
        if DEFAULT not in template:
            raise MLLMError(_nameless(name, folder))
        template = template[DEFAULT]
    if not isinstance(template, str):
        raise MLLMError(f"The chat template in {name} of the MLLM folder {folder.name} is damaged: download it again.")
    return template


def _nameless(name: str, folder: Path) -> str:
    return (
        f"{name} of the MLLM folder {folder.name} has several chat templates and none named {DEFAULT!r}: put the one "
        f"for pictures there as {PLAIN_TEMPLATE}."
    )


def _for_text_alone(name: str) -> str:
    return (
        f"The chat template of the MLLM folder {name} can't write a conversation with pictures: put the "
        f"{PLAIN_TEMPLATE} or {WRAPPED_TEMPLATE} there that the MLLM was released with."
    )


def _text(file: Path, folder: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MLLMError(f"{file.name} of the MLLM folder {folder.name} is damaged: download it again.") from error


def _file(folder: Path, name: str) -> dict | None:
    """A JSON file of the folder, or None if it has none."""
    path = folder / name
    return read_json(path, f"the MLLM folder {folder.name}") if path.is_file() else None
