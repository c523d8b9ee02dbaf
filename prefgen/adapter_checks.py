"""What fits an adapter: the model that it is applied to, and the models that read the history.

A mismatch would paint a wrong picture without a word, so each is refused before sampling in one sentence that says what
to connect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .adapter import FAMILY_NAMES, FLUX, AdapterHeader
from .encoded import EncodedPreference
from .errors import AdapterError
from .image_encoder import CLIP, SAME_ENCODER, SIGLIP, encoder_in_words, likeness
from .ip_adapter import STATES, encoder_name, other_width_of

# What must be the same for two MLLMs to give the same hidden states.
MLLM_IDENTITY = ("num_layers", "hidden_size", "revision", "lora", "prompt_version")
ANOTHER_ENCODER = {"hidden_size": "is another one of equal width", "digest": "has the same shape and other weights"}


def check_compatible(header: AdapterHeader, block_widths: Sequence[int], cross_dim: int, family_hint: str = "") -> None:
    """Raise AdapterError when the adapter doesn't fit a UNet with these cross-attention widths (file order) and text
    width. family_hint: what people call the connected model."""
    if list(block_widths) == list(header.block_widths) and cross_dim == header.cross_attention_dim:
        return
    trained_for = FAMILY_NAMES.get(header.base_family, header.base_family)
    connected = FAMILY_NAMES.get(family_hint, family_hint) or f"a UNet with text width {cross_dim}"
    if trained_for == connected:
        connected = (
            f"another variant of it ({len(block_widths)} cross-attentions instead of {len(header.block_widths)})"
        )
    raise AdapterError(
        f"This adapter is for {trained_for}; the model you connected is {connected}. Choose an adapter for that model."
    )


def check_encoded(header: AdapterHeader, encoded: EncodedPreference) -> None:
    """Raise AdapterError when a history was read by other models than the adapter was trained with."""
    if header.kind == "ip_adapter":
        _check_pictures(header, encoded)
        return
    if encoded.hidden is None and not header.image_width:
        raise AdapterError(
            "This adapter sees the history through its MLLM alone: connect Load Preference MLLM to Encode Preference "
            "History."
        )
    if header.mllm and encoded.hidden is not None:
        _check_mllm(header.mllm, encoded.mllm)
    # Of another kind of encoder, which gives no embedding, its name helps more than that one is missing.
    if encoded.clip_vision and header.image_width:
        _check_encoder(header, encoded.clip_vision)
    if not header.mllm and encoded.image_embed_liked is None:
        raise AdapterError(
            "This adapter sees the history through CLIP vision alone: connect "
            f"{header.clip_vision.get('name', 'the model that it was trained with')} to clip_vision in Encode "
            "Preference History."
        )


def _check_mllm(trained: Mapping, connected: Mapping) -> None:
    """Raise AdapterError unless a history was read by the MLLM of the training, as the training read it."""
    if any(key in trained and trained[key] != connected.get(key) for key in MLLM_IDENTITY):
        raise AdapterError(
            f"This adapter was trained with the MLLM {_mllm_in_words(trained)}; the history was read by "
            f"{_mllm_in_words(connected)}. Choose that MLLM in Load Preference MLLM, or an adapter for this one."
        )
    # The same weights read another way with another chat template, tokenizer or image processor. Older adapters don't
    # say how theirs read.
    if trained.get("reading") and connected.get("reading") and trained["reading"] != connected["reading"]:
        raise AdapterError(
            f"The folder of the MLLM {connected.get('name', '?')} has another chat template, tokenizer or image "
            "processor than the one that this adapter was trained with: put those files back as the MLLM was released, "
            "or choose an adapter for this one."
        )


def _check_encoder(header: AdapterHeader, connected: Mapping) -> None:
    """Raise AdapterError when the pictures of a PrefGen adapter were read by another encoder than in its training."""
    trained = header.clip_vision
    name = trained.get("name", "unknown")
    width = connected.get("width")
    if connected.get("architecture", CLIP) != CLIP:
        raise AdapterError(
            f"This adapter needs CLIP vision embeddings of width {header.image_width} ({name}); the connected model is "
            f"{encoder_in_words(connected)}, which encodes pictures differently. Connect the right one, or none."
        )
    if width is not None and width != header.image_width:
        raise AdapterError(
            f"This adapter needs CLIP vision embeddings of width {header.image_width} ({name}); the connected CLIP "
            f"vision model gives {width}. Connect the right one, or none."
        )
    if trained.get("fixed_picture") and connected.get("fixed_picture"):
        alike = likeness(trained["fixed_picture"], connected["fixed_picture"])
        if alike < SAME_ENCODER:
            raise AdapterError(
                f"This adapter was trained with the CLIP vision model {name}; the connected one embeds the same "
                f"picture otherwise (cosine {alike:.2f}). Connect {name} in Encode Preference History, or none."
            )
        return
    # Files of before 0.1 say a digest of the weights, or nothing.
    for key, difference in ANOTHER_ENCODER.items():
        if trained.get(key) and connected.get(key) and trained[key] != connected[key]:
            raise AdapterError(
                f"This adapter was trained with the CLIP vision model {name}; the connected one {difference}. Connect "
                f"{name} in Encode Preference History, or none."
            )


def _check_pictures(header: AdapterHeader, encoded: EncodedPreference) -> None:
    """The same for an IP-Adapter file, which needs one CLIP vision model and nothing else."""
    name = header.clip_vision["name"]
    output = header.clip_vision["output"]
    connected = encoded.clip_vision
    architecture = header.clip_vision.get("architecture", CLIP)
    if connected.get("architecture", CLIP) != architecture:
        raise AdapterError(
            f"This IP-Adapter reads {name} (width {header.image_width}); the connected model is "
            f"{encoder_in_words(connected)}, which encodes pictures differently: connect {name} in Encode Preference "
            "History."
        )
    if encoded.image_embed_liked is None and connected and architecture == SIGLIP:
        raise AdapterError(
            "This IP-Adapter reads what SigLIP's pooling head gives, which ComfyUI leaves out: put the file that Load "
            "CLIP Vision loads into models/clip_vision whole, as sigclip_vision_patch14_384 is, and load it from there."
        )
    if encoded.image_embed_liked is None:
        raise AdapterError(
            f"An IP-Adapter sees the history through CLIP vision alone: connect {name} to clip_vision in Encode "
            "Preference History."
        )
    width = connected.get("width")
    other_width = connected.get("states_width")
    if output == STATES:
        width, other_width = other_width, width
    if width is None:
        raise AdapterError(
            f"This IP-Adapter reads the hidden states of {name}; the connected CLIP vision model gives none: connect "
            f"{name} in Encode Preference History, or choose a base IP-Adapter."
        )
    if width != header.image_width:
        raise AdapterError(
            f"This IP-Adapter reads {name} (width {header.image_width}); the connected CLIP vision model is "
            f"{encoder_name(output, width)} (width {width}): connect {name} in Encode Preference History."
        )
    if header.base_family == FLUX and encoded.image_embed_none is None:
        raise AdapterError(
            f"This IP-Adapter takes a black picture for none, which was not read beside this history: connect {name} "
            "in Encode Preference History and encode it again."
        )
    # A ViT-g has the embedding's width of a ViT-H, and other states.
    expected = other_width_of(output, width)
    if expected is not None and other_width is not None and other_width != expected:
        raise AdapterError(
            f"This IP-Adapter reads {name} (widths {width} and {expected}); the connected CLIP vision model has "
            f"{width} and {other_width}, so it is another one: connect {name} in Encode Preference History."
        )


def _mllm_in_words(mllm: Mapping) -> str:
    """An MLLM by its name, size, revision and LoRA."""
    revision = str(mllm.get("revision", ""))[:8]
    lora = f", LoRA {str(mllm['lora'])[:8]}" if mllm.get("lora") else ""
    layers = f"{mllm.get('num_layers', '?')} layers of {mllm.get('hidden_size', '?')}"
    return f"{mllm.get('name', '?')} ({layers}, {revision}{lora})"
