"""From pictures on the graph to an encoded history, with progress, interruption and caches."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.utils
import torch

from ..encoded import EncodedPreference
from ..flux_adapter import FLUX_WIDTHS
from ..history import HistoryItem, PreferenceHistory
from ..image_encoder import CLIP, SIGLIP, described, fixed_picture, rounded
from ..lru import LeastRecentlyUsed
from ..mllm.answer import Answer
from ..mllm.traits import Traits
from ..siglip import NORM, PoolingHead, load_head
from . import folders
from .histories import name_of
from .memory import ManagedMLLM

# In place of a picture's digest.
NOTHING = ""
FIXED = "fixed picture"
BLACK = "black picture"
CACHED_PICTURES = 128  # the states of one picture are 1.3 MB with CLIP ViT-H
# CLIP vision model -> {picture digest: (embedding, states)}, and -> what it is. Both go with their model.
_read: WeakKeyDictionary = WeakKeyDictionary()
_described: WeakKeyDictionary = WeakKeyDictionary()
_heads: WeakKeyDictionary = WeakKeyDictionary()


def encode_history(
    history: PreferenceHistory, managed: ManagedMLLM | None = None, clip_vision=None
) -> EncodedPreference:
    """Read a history with the MLLM, with CLIP vision, or with both. Shows ComfyUI's progress bar and stops at its
    interrupt; what was read before is never read again. Raises ValueError with one sentence if there is neither."""
    if managed is None and clip_vision is None:
        raise ValueError(
            "Nothing reads the history: connect an MLLM (for a PrefGen adapter) or a CLIP vision model (for an "
            "IP-Adapter) to Encode Preference History."
        )
    encoder = encoder_of(clip_vision) if clip_vision is not None else {}
    # No adapter reads another kind: Fuse User Vector names it beside the one that the adapter needs.
    reads_pictures = clip_vision is not None and gives_embeddings(clip_vision, encoder)
    mllm_steps = len(history) + 1 if managed is not None else 0
    bar = comfy.utils.ProgressBar(mllm_steps + (len(history) if reads_pictures else 0))
    interrupt()
    hidden = None
    if managed is not None:
        hidden = hidden_states(history, managed, bar)
        bar.update_absolute(mllm_steps)
    liked = disliked = states_liked = states_disliked = states_none = embed_none = None
    if reads_pictures:
        liked, states_liked = read_pictures(clip_vision, history.liked, bar)
        if history.disliked:
            disliked, states_disliked = read_pictures(clip_vision, history.disliked, bar)
        encoder["width"] = liked.shape[-1]
        encoder["fixed_picture"] = read_fixed_picture(clip_vision)
        if liked.shape[-1] in FLUX_WIDTHS:
            embed_none = read_black(clip_vision)
        if states_liked is not None:
            states_none = read_nothing(clip_vision)
            encoder["states_width"] = states_liked.shape[-1]
    return EncodedPreference(
        hidden=hidden,
        image_embed_liked=liked,
        image_embed_disliked=disliked,
        mllm=managed.mllm.fingerprint if managed is not None else {},
        clip_vision=encoder,
        digest=history.digest,
        image_states_liked=states_liked,
        image_states_disliked=states_disliked,
        image_states_none=states_none,
        image_embed_none=embed_none,
        taste=name_of(history),
    )


def hidden_states(history: PreferenceHistory, managed: ManagedMLLM, bar) -> torch.Tensor:
    """H [layers, D] of a history; the MLLM is moved to its device only for one that it has not read."""
    if managed.mllm.has_encoded(history):
        return managed.mllm.encode(history)
    with managed.on_device() as mllm:
        return mllm.encode(history, progress=lambda done, _: bar.update_absolute(done), interrupt=interrupt)


def describe_history(history: PreferenceHistory, managed: ManagedMLLM) -> Traits:
    """What the MLLM says that the user likes and dislikes and how sure it is, with progress and interruption."""
    bar = comfy.utils.ProgressBar(len(history) + 1)
    answers: list[Answer] = []
    with managed.on_device() as mllm:

        def answer(question: str) -> str:
            answers.append(
                mllm.spoken(history, question, progress=lambda done, _: bar.update_absolute(done), interrupt=interrupt)
            )
            return answers[-1].text

        traits = Traits.asked(answer, bool(history.disliked))
    return replace(traits, sure=sureness(traits, answers))


def sureness(traits: Traits, answers: list[Answer]) -> dict[str, float]:
    """How sure an MLLM was of each trait, from the answers that name it."""
    sure = {trait: [each.sureness(trait) for each in answers] for trait in (*traits.liked, *traits.disliked)}
    return {trait: max(filter(None, numbers)) for trait, numbers in sure.items() if any(numbers)}


def encoder_of(clip_vision) -> dict:
    """What a CLIP_VISION is, by its weights (see `described`); {} for one of another pack that has none to look at."""
    model = clip_vision.model
    if model not in _described:
        _described[model] = described(model.state_dict()) if isinstance(model, torch.nn.Module) else {}
    return dict(_described[model])


def gives_embeddings(clip_vision, encoder: dict) -> bool:
    """Whether an image encoder, of which `encoder_of` says this, gives an embedding that some adapter reads."""
    architecture = encoder.get("architecture", CLIP)
    return architecture == CLIP or (architecture == SIGLIP and pooling_head(clip_vision) is not None)


def pooling_head(clip_vision) -> PoolingHead | None:
    """The head of a SigLIP model, from the file in models/clip_vision that the model is of; None of every other one."""
    model = clip_vision.model
    if model not in _heads:
        norm = None
        if encoder_of(clip_vision).get("architecture") == SIGLIP:
            norm = model.state_dict().get(NORM)
        paths = [path for path in folders.clip_visions().values() if path is not None and norm is not None]
        _heads[model] = next((head for path in paths if (head := load_head(path, norm)) is not None), None)
    return _heads[model]


@torch.no_grad()
def embedding_in(clip_vision, output) -> torch.Tensor:
    """The embedding [I] of the one picture in what an image encoder gave, fp32 on the CPU."""
    embedding = output["image_embeds"].float().cpu()
    head = pooling_head(clip_vision)
    # What ComfyUI calls SigLIP's embedding are its normed states.
    return embedding[0] if head is None else head(embedding)[0]


def interrupt() -> None:
    """Raise ComfyUI's own exception if the artist has stopped the queue."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def read_pictures(clip_vision, items: tuple[HistoryItem, ...], bar) -> tuple[torch.Tensor, torch.Tensor | None]:
    """CLIP image embeddings [n, I] and penultimate hidden states [n, T, E] (None if the model gives none), fp32 on the
    CPU, each picture read once. Raises ValueError with one sentence for what can't be a picture's."""
    cache = _read.setdefault(clip_vision.model, LeastRecentlyUsed(CACHED_PICTURES))
    rows = []
    for item in items:
        interrupt()
        if item.digest not in cache:
            output = clip_vision.encode_image(item.image[None])
            states = getattr(output, "penultimate_hidden_states", None)
            # SigLIP's states are megabytes that no adapter reads.
            if pooling_head(clip_vision) is not None:
                states = None
            row = (embedding_in(clip_vision, output), None if states is None else states[0].float().cpu())
            check_read(row)
            cache[item.digest] = row
        rows.append(cache[item.digest])
        bar.update(1)
    embeds, states = zip(*rows, strict=True)
    return torch.stack(embeds), None if states[0] is None else torch.stack(states)


def check_read(row: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """ComfyUI fills what a CLIP vision file lacks with whatever the memory holds, and only its log says so."""
    embedding = row[0]
    sound = all(torch.isfinite(part).all() for part in row if part is not None)
    if embedding.ndim != 1 or not sound or not embedding.any():
        raise ValueError(
            "The connected CLIP vision model gives no embedding of a picture, or values that are not numbers: its file "
            "is damaged, or holds no image projection. Choose another in Load CLIP Vision."
        )


def read_fixed_picture(clip_vision) -> list[float]:
    """What tells this encoder from another one: its embedding of the picture that adapters' headers have theirs of."""
    cache = _read.setdefault(clip_vision.model, LeastRecentlyUsed(CACHED_PICTURES))
    if FIXED not in cache:
        # 224: of another pack's encoder that doesn't say its side.
        picture = fixed_picture(getattr(clip_vision, "image_size", 224))
        cache[FIXED] = rounded(embedding_in(clip_vision, clip_vision.encode_image(picture[None])))
    return cache[FIXED]


def read_black(clip_vision) -> torch.Tensor:
    """The embedding [I] of a black picture, which XLabs' adapters for Flux take for none."""
    cache = _read[clip_vision.model]
    if BLACK not in cache:
        side = getattr(clip_vision, "image_size", 224)
        cache[BLACK] = embedding_in(clip_vision, clip_vision.encode_image(torch.zeros(1, side, side, 3)))
    return cache[BLACK]


def read_nothing(clip_vision) -> torch.Tensor:
    """The penultimate hidden states [T, E] of an all-zero input, which adapters that read states take for none."""
    # Zero after normalisation is the average colour of the training set, which no picture in 255 steps has: so this
    # doesn't go through `encode_image`. The cache is that of the pictures, which were read just before.
    cache = _read[clip_vision.model]
    if NOTHING not in cache:
        comfy.model_management.load_model_gpu(clip_vision.patcher)
        pixels = torch.zeros(1, 3, clip_vision.image_size, clip_vision.image_size, device=clip_vision.load_device)
        _, states, *_ = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
        cache[NOTHING] = states[0].float().cpu()
    return cache[NOTHING]
