"""What fits a connected model, for Apply Taste: an adapter with the models that read pictures for it, or an MLLM alone
that puts the taste into words.

Only headers are read here, and files are known by what is in them. A file's name decides one thing: of IP-Adapters with
the same shapes, those called "face" come last, since they were trained on faces alone and nothing in them says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ..adapter import FAMILY_NAMES, AdapterHeader
from ..adapter_checks import ANOTHER_ENCODER
from ..adapter_file import adapter_header
from ..errors import AdapterError
from ..files import file_state
from ..ip_adapter import EMBEDDING, STATES, other_width_of
from ..mllm.files import MLLMError, check_folder, weight_bytes
from . import folders, memory, readers
from .bases import base_of, embedded_family, why_unreached
from .encoding import encoder_of

AUTO = "auto"
WORDS = "words only"
# Sets of `python -m prefgen.download`.
ADAPTER_SETS = {"SD1.5": "sd15-plus", "SDXL": "sdxl-plus"}
MLLM_SET = "qwen3-vl-2b"


@dataclass(frozen=True)
class Choice:
    """Combo entries. adapter: None where the taste goes into words. mllm, clip_vision: None where nothing reads by one.
    reason: why it goes into words, "" where the artist asked for them."""

    adapter: str | None
    mllm: str | None
    lora: str = folders.NO_LORA
    clip_vision: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Request:
    """What an artist chose: combo entries, or AUTO."""

    adapter: str = AUTO
    mllm: str = AUTO
    clip_vision: str = AUTO


def choose(model: ModelPatcher, request: Request) -> Choice:
    """What to use for a model. Raises AdapterError or ChoiceError with one sentence that says what is missing, where it
    belongs and which command fetches it."""
    if request.adapter == WORDS:
        return in_words(model, request.mllm, "")
    if request.adapter != AUTO:
        header = header_of(folders.adapter_path(request.adapter))
        return with_readers(request.adapter, header, request)
    reasons = []
    for name, header in fitting(model):
        try:
            return with_readers(name, header, request)
        except folders.ChoiceError as error:
            reasons.append(str(error))
    return in_words(model, request.mllm, reasons[0] if reasons else no_adapter(model))


def adapter_kinds() -> dict[str, str]:
    """{combo entry: "prefgen" or "ip_adapter"} of every adapter that can be read."""
    kinds = {}
    for name, path in folders.adapters().items():
        try:
            kinds[name] = header_of(path).kind
        except AdapterError:
            continue
    return kinds


def no_adapter(model: ModelPatcher) -> str:
    """The sentence for a model that no adapter here fits."""
    name = model_name(model)
    if name in ADAPTER_SETS:
        return (
            f"No adapter for {name} is here: `python -m prefgen.download {ADAPTER_SETS[name]}` puts one into "
            "models/ipadapter."
        )
    base = base_of(model)
    if base is not None and base.doubles:
        return (
            f"No adapter for {name} is here: XLabs' flux-ip-adapter-v2 in models/ipadapter and CLIP ViT-L in "
            "models/clip_vision reach it."
        )
    why = why_unreached(model)
    return f"No adapter reaches {name}{f' ({why})' if why else ''}: it takes a taste in words alone."


def model_name(model: ModelPatcher) -> str:
    """What people call a model: its family where an adapter could reach it, else its class."""
    base = base_of(model)
    return type(model.model).__name__ if base is None else base.name


def fitting(model: ModelPatcher) -> Iterator[tuple[str, AdapterHeader]]:
    """(combo entry, header) of all adapters that fit a model, the best first."""
    base = base_of(model)
    if base is None:
        return
    ranked = []
    for name, path in folders.adapters().items():
        try:
            header = header_of(path)
            base.check(header)
        except AdapterError:
            continue
        ranked.append((rank(name, header), name, header))
    ranked.sort(key=lambda entry: entry[0])
    for _, name, header in ranked:
        yield name, header


def rank(name: str, header: AdapterHeader) -> tuple[int, bool]:
    """Of an adapter among those that fit, lower is better: those that learnt tastes, then plus IP-Adapters (16 tokens),
    base ones (4), and those of faces. An artist's own goes before the embedded one."""
    if header.kind == "prefgen":
        order = 0
    elif not header.tokens or "face" in name.lower():
        order = 3
    else:
        order = 1 if header.clip_vision["output"] == STATES else 2
    return order, name == folders.EMBEDDED


def with_readers(name: str, header: AdapterHeader, request: Request) -> Choice:
    """An adapter with the models that read pictures for it. Raises ChoiceError with one sentence if one isn't here."""
    mllm: str | None = None
    lora = folders.NO_LORA
    if header.mllm:
        trained = readers.trained_mllm(header.mllm)
        if request.mllm != AUTO:
            mllm = request.mllm
            lora = trained[1] if trained and trained[0] == mllm else lora
        elif trained:
            mllm, lora = trained
        else:
            raise folders.ChoiceError(
                f"{name} was trained with the MLLM {header.mllm.get('name', '?')}, which isn't here as it was: put its "
                "folder into models/prefgen/mllm."
            )
    if request.clip_vision != AUTO:
        return Choice(name, mllm, lora, request.clip_vision)
    clip_vision = encoder_for(header) if header.image_width else None
    if clip_vision is None and mllm is None:
        wanted = header.clip_vision.get("name", f"a CLIP vision model of width {header.image_width}")
        download = ADAPTER_SETS.get(FAMILY_NAMES.get(header.base_family, ""))
        how = f"`python -m prefgen.download {download}` puts it" if download else "put it"
        raise folders.ChoiceError(f"{name} reads {wanted}, which isn't in models/clip_vision: {how} there.")
    return Choice(name, mllm, lora, clip_vision)


def encoder_for(header: AdapterHeader) -> str | None:
    """The first CLIP vision model that an adapter can read; None if there is none."""
    for name in folders.clip_visions():
        widths = readers.widths_of(name)
        if widths is None or not reads(header, widths):
            continue
        trained = header.clip_vision
        # Of equal width may be another training: only an adapter that says which one is asked to wait for loading it.
        if any(trained.get(key) for key in ANOTHER_ENCODER):
            connected = encoder_of(readers.load_clip_vision(name))
            if any(trained.get(k) and connected.get(k) and trained[k] != connected[k] for k in ANOTHER_ENCODER):
                continue
        return name
    return None


def reads(header: AdapterHeader, widths: readers.EncoderWidths) -> bool:
    """Whether an adapter reads a CLIP vision model of these widths."""
    if header.kind != "ip_adapter":
        return widths.embedding == header.image_width
    output = header.clip_vision["output"]
    read, other = widths if output == EMBEDDING else widths[::-1]
    return read == header.image_width and other_width_of(output, read) in (None, other)


def in_words(model: ModelPatcher, mllm: str, reason: str) -> Choice:
    """An MLLM that puts the taste into words. Raises ChoiceError with one sentence if there is none."""
    if mllm != AUTO:
        return Choice(None, mllm, reason=reason)
    if embedded_family(model) == folders.EMBEDDED:
        return Choice(None, folders.EMBEDDED, reason=reason)
    chosen = largest_mllm()
    if chosen is None:
        # Where an adapter would fit, what it lacks is said alone.
        if reason and base_of(model) is not None:
            raise folders.ChoiceError(reason)
        why = f"{reason[:-1]}, and no" if reason else "No"
        raise folders.ChoiceError(
            f"{why} MLLM is here to find the words: `python -m prefgen.download {MLLM_SET}` puts one into "
            "models/prefgen/mllm."
        )
    return Choice(None, chosen, reason=reason)


def largest_mllm() -> str | None:
    """The largest MLLM that the device has room for, else the smallest; None if there is none. The atelier's is left
    out: it knows the words of the atelier alone."""
    device = memory.pick_device(AUTO)
    itemsize = memory.pick_dtype(AUTO, device, False).itemsize
    sizes = []
    for name, path in folders.mllms().items():
        if name == folders.EMBEDDED:
            continue
        try:
            check_folder(path)
            sizes.append((weight_bytes(path, itemsize), name))
        except MLLMError:
            continue
    # All of the device's memory and not what is free now, so that the same graph always takes the same.
    total = comfy.model_management.get_total_memory(device)
    fit = [entry for entry in sizes if entry[0] + comfy.model_management.minimum_inference_memory() <= total]
    if fit:
        return max(fit)[1]
    return min(sizes)[1] if sizes else None


def header_of(path: Path) -> AdapterHeader:
    """`adapter_header`, read once for each state of a file."""
    return _header(path, file_state(path) if path.is_file() else ())


@lru_cache(512)
def _header(path: Path, _state: tuple) -> AdapterHeader:
    return adapter_header(path)
