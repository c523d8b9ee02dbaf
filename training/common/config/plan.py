"""`--plan`: what every stage of a configuration needs, from shapes alone.

Models are built on the meta device and run there once: torch counts the operations and the tensors that autograd saves.
No weights are loaded and no file has to be there. Nothing is measured either: memory is rough (no fragmentation, no
buffers of the libraries), and time stands and falls with `tflops`, what the configuration assumes a device to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prefgen.adapter import UserProjection
from prefgen.aligner import SemanticAligner
from prefgen.compat import decoder_of
from prefgen.dtypes import DTYPES
from prefgen.mllm.families import family_parts

from . import shapes
from .schema import Config

GIB = 2**30
# The paper's set (arXiv 2512.06020), where none is there to be counted.
PICTURES = 990_998
USERS = 50_153
# Text tokens: beside a picture, and of the question with its answer.
PICTURE_WORDS = 6
QUESTION_WORDS = 60
# Bytes of a 4-bit weight with its scales; of a trained weight (itself, its gradient and Adam's two moments, all in
# fp32); and of its average.
NF4_BYTES = 0.56
TRAINED_BYTES = 16
EMA_BYTES = 4
ONE_PROCESS = ("atelier", "extract", "probe_layers", "export")
ATELIER_STAGES = ("pool", "vae", "clip", "judge", "unet", "mllm_vision")


@dataclass(frozen=True)
class Cost:
    """flops: of one forward pass. saved: values that autograd saves for the backward pass, without the weights."""

    flops: float
    saved: float


@dataclass(frozen=True)
class Reader:
    """The MLLM in figures. tokens, patches: of one picture; layers, width: of the decoder; lora: its parameters."""

    parameters: int
    decoder: nn.Module
    linear: int
    vision: int
    tokens: int
    patches: int
    lora: int
    modules: int

    @property
    def layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def width(self) -> int:
        return self.decoder.config.hidden_size


def plan(name: str, config: Config) -> str:
    """What `--plan` prints for a configuration and its name on the command line."""
    stages = [*_atelier_stages(config), *_stages(config)]
    launch = "python" if config.devices == 1 else "accelerate launch --config_file training/configs/accelerate/ddp.yaml"
    lines = [
        f"{name}: {config.hardware}",
        f"expected: {config.expected}",
        f"Estimated from shapes; {config.devices} device(s) that reach {config.tflops:g} TFLOP/s each are assumed.",
    ]
    for stage, facts in stages:
        alone = "python" if stage.split(".")[0] in ONE_PROCESS else launch
        lines += ["", stage, f"  {alone} -m training.{stage} --config {name}", *(f"  {fact}" for fact in facts)]
    return "\n".join(lines)


def _atelier_stages(config: Config) -> Iterator[tuple[str, list[str]]]:
    """The stages that make the atelier's base models."""
    if config.base.family != "atelier":
        return
    for stage in ATELIER_STAGES:
        section = getattr(config.atelier, stage)
        if stage == "pool":
            yield "atelier.pool", [f"{section.count:,} pictures, {section.count * 128 * 128 * 3 / GIB:.1f} GiB on disk"]
        else:
            yield f"atelier.{stage}", [_samples(section)]


def _stages(config: Config) -> Iterator[tuple[str, list[str]]]:
    reader = _reader(config)
    if reader is None:
        path = config.mllm.path
        reason = "isn't there, and no published shape has its name"
        if path is not None and path.exists():
            reason = "is of a family that PrefGen doesn't know"
        unknown = [f"mllm.path {path} {reason}: no estimate"]
        for stage in ("train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention"):
            yield stage, unknown
        return
    yield "train_mllm", _train_mllm(config, reader)
    yield "extract", _extract(config, reader)
    yield "probe_layers", _probe_layers(config, reader)
    yield "train_alignment", _train_alignment(config, reader)
    yield "train_user_attention", _train_user_attention(config, reader)
    if config.base.family != "atelier":
        yield "export", ["seconds, no device"]


def _train_mllm(config: Config, reader: Reader) -> list[str]:
    section = config.train_mllm
    mllm = config.mllm
    pictures = 2 * section.pictures + 1
    tokens = _history_tokens(reader, pictures)
    at_once = _samples_at_once(config, section)
    forward = _decoder_cost(reader, tokens)
    trained = reader.lora if mllm.lora else shapes.parameters(reader.decoder)
    saved = forward.saved
    if mllm.gradient_checkpointing:  # the inputs of all layers, and the inside of one
        saved = saved / reader.layers + reader.layers * tokens * reader.width
    # Backward is one more pass for the activations, one for the trained weights, one for what wasn't saved.
    passes = 2 + (not mllm.lora) + mllm.gradient_checkpointing
    flops = section.steps * section.batch * (passes * forward.flops + _vision_flops(reader, pictures))
    kind = f"LoRA of {trained / 1e6:.1f} M weights in {reader.modules} modules" if mllm.lora else "trained whole"
    return [
        f"{reader.parameters / 1e6:,.0f} M weights, {kind}; {_samples(section)} of about {tokens:,} tokens",
        _memory(_mllm_bytes(config, reader), trained * TRAINED_BYTES, at_once * saved * _width(mllm.precision))
        + f", {at_once} sample(s) at once",
        _time(config, flops),
    ]


def _extract(config: Config, reader: Reader) -> list[str]:
    section = config.extract
    users = section.users or USERS
    count = users * section.histories
    tokens = _history_tokens(reader, 2 * section.pictures)
    flops = count * (_decoder_cost(reader, tokens).flops + _vision_flops(reader, 2 * section.pictures))
    disk = count * (reader.layers * reader.width + shapes.VISION_WIDTH[config.base.family]) * 2
    states = section.batch * tokens * reader.width * (reader.layers + 8) * 2
    weights = _mllm_bytes(config, reader) + shapes.VISION_PARAMETERS[config.base.family] * 2
    return [
        f"{users:,} users x {section.histories} histories of about {tokens:,} tokens; {disk / GIB:.2f} GiB on disk",
        _memory(weights, 0, states) + f", {section.batch} histories at once",
        _time(config, flops, devices=1),
    ]


def _probe_layers(config: Config, reader: Reader) -> list[str]:
    section = config.probe_layers
    tokens = _history_tokens(reader, 2 * section.pictures + 1)
    # The reported group is read with a stranger's history too.
    reads = section.users * section.histories * (3 + 3 + 5)
    flops = reads * _decoder_cost(reader, tokens).flops + _vision_flops(reader, reads * (2 * section.pictures + 1) // 3)
    disk = reads * reader.layers * reader.width * 2
    return [
        f"3 x {section.users} users x {section.histories} histories, {reads:,} readings; {disk / GIB:.2f} GiB on disk",
        _memory(_mllm_bytes(config, reader), 0, tokens * reader.width * 16 * 2) + ", one history at once",
        _time(config, flops, devices=1),
    ]


def _train_alignment(config: Config, reader: Reader) -> list[str]:
    section = config.train_alignment
    with torch.device("meta"):
        weights = shapes.parameters(SemanticAligner(4, reader.width, shapes.TEXT_WIDTH[config.base.family]))
    users = config.extract.users or USERS
    states = users * config.extract.histories * 4 * reader.width * 4
    kernels = 5 * 4 * section.batch * (section.batch + section.bank)
    return [
        f"{weights / 1e6:.1f} M weights; {_samples(section)} against a bank of {section.bank:,}",
        _memory(states, weights * TRAINED_BYTES, kernels),
        "minutes on any device",
    ]


def _train_user_attention(config: Config, reader: Reader) -> list[str]:
    section = config.train_user_attention
    base = config.base
    unet = shapes.unet(config)
    width = shapes.TEXT_WIDTH[base.family] + reader.width + shapes.VISION_WIDTH[base.family]
    branch = branch_parameters(unet)
    projection = _projection_parameters(width, unet.config.cross_attention_dim, section.tokens)
    at_once = _samples_at_once(config, section)
    side = base.pixels // 8
    forward = _unet_cost(unet, side)
    saved = forward.saved / (5 if base.gradient_checkpointing else 1)  # about a block in five at once
    passes = 2 + base.gradient_checkpointing + (section.distil > 0)
    weights = shapes.parameters(unet)
    users = min(config.extract.users or USERS, USERS)
    pictures = min(users * PICTURES // USERS // 2, PICTURES // 2)
    frozen = weights if section.cache_text else weights + shapes.TEXT_ENCODERS.get(base.family, 0)
    facts = [
        f"UNet of {weights / 1e6:,.1f} M weights, frozen; K and V of the branch {branch / 1e6:.1f} M, projection of "
        f"the user vector {projection / 1e6:.1f} M; {_samples(section)} at {base.pixels} px",
        _memory(
            frozen * _width(base.precision),
            (branch + projection) * (TRAINED_BYTES + EMA_BYTES),
            at_once * saved * _width(base.precision),
        )
        + f", {at_once} picture(s) at once",
        _time(config, section.steps * section.batch * passes * forward.flops),
    ]
    if base.family == "atelier":
        return facts
    states = 77 * unet.config.cross_attention_dim * 2
    latents = pictures * 4 * side * side * 2
    texts = 2 * pictures * states if section.cache_text else 0
    encode = _vae_cost(config) * pictures
    return [
        *facts,
        f"caches of up to {pictures:,} liked pictures: latents {latents / GIB:.1f} GiB, text states "
        f"{texts / GIB:.1f} GiB on disk; {_hours(encode / (config.tflops * 1e12))} for the VAE on one device",
    ]


def branch_parameters(unet: nn.Module) -> int:
    """Weights of K and V for every cross-attention of a UNet: twice [hidden, cross_attention_dim]."""
    return sum(
        module.to_k.weight.numel() + module.to_v.weight.numel()
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    )


def _projection_parameters(width: int, cross_attention_dim: int, tokens: int) -> int:
    with torch.device("meta"):
        return shapes.parameters(UserProjection(width, cross_attention_dim, tokens))


def _reader(config: Config) -> Reader | None:
    model = shapes.mllm(config)
    if model is None:
        return None
    try:
        family = family_parts(model)
    except ValueError:  # a model of no family of ours
        return None
    decoder = decoder_of(model)
    targets = config.mllm.lora.targets if config.mllm.lora else ()
    linear = {name: m for name, m in decoder.layers.named_modules() if isinstance(m, nn.Linear)}
    adapted = [m for name, m in linear.items() if name.rpartition(".")[2] in targets]
    rank = config.mllm.lora.rank if config.mllm.lora else 0
    return Reader(
        parameters=shapes.parameters(model),
        decoder=decoder,
        linear=sum(m.weight.numel() for m in linear.values()),
        vision=shapes.parameters(family.vision),
        tokens=family.tokens_per_image,
        patches=(family.image_size // family.patch_size) ** 2,
        lora=sum(rank * (m.in_features + m.out_features) for m in adapted),
        modules=len(adapted),
    )


def _history_tokens(reader: Reader, pictures: int) -> int:
    return pictures * (reader.tokens + PICTURE_WORDS) + QUESTION_WORDS


def _vision_flops(reader: Reader, pictures: int) -> float:
    """Operations of the vision tower on so many pictures."""
    return 2.0 * reader.vision * reader.patches * pictures


def _decoder_cost(reader: Reader, tokens: int) -> Cost:
    """One sample through the decoder."""
    inputs = torch.empty(1, tokens, reader.width, device="meta", requires_grad=True)
    # A mask of its own, in full: else transformers would look into values to make one.
    mask = torch.empty(1, 1, tokens, tokens, device="meta", dtype=torch.bool)
    return cost_of(lambda: reader.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False), reader.decoder)


def _unet_cost(unet: nn.Module, side: int) -> Cost:
    """One latent through the UNet, whose text states stand for what the gradient flows to."""

    def tensor(*shape, **options):
        return torch.empty(*shape, device="meta", **options)

    states = tensor(1, 77, unet.config.cross_attention_dim, requires_grad=True)
    added = None
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": tensor(1, 1280), "time_ids": tensor(1, 6)}
    latent = tensor(1, unet.config.in_channels, side, side)
    timestep = torch.zeros(1, device="meta")
    return cost_of(lambda: unet(latent, timestep, states, added_cond_kwargs=added), unet)


def _vae_cost(config: Config) -> float:
    """Operations of encoding one picture."""
    vae = shapes.vae(config)
    picture = torch.empty(1, 3, config.base.pixels, config.base.pixels, device="meta")
    return cost_of(lambda: vae.encoder(picture), vae).flops


def cost_of(forward: Callable[[], object], weights: nn.Module) -> Cost:
    """Run a forward pass on the meta device and count. Attention counts as fused: its matrix is never saved."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    # The storages themselves, so that no address is used twice.
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.setdefault(storage._cdata, storage)
        return tensor

    with _fused_attention() as attention, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            forward()
    saved_bytes = sum(storage.nbytes() for storage in storages.values())
    return Cost(counter.get_total_flops() + sum(attention), saved_bytes / 4)


@contextmanager
def _fused_attention() -> Iterator[list[int]]:
    """Stands in for torch's attention, which has no fused kernel on the meta device. Yields its operations."""
    original = nn.functional.scaled_dot_product_attention
    operations: list[int] = []

    def attention(query, key, value, *_, **__):
        operations.append(4 * query.numel() * key.shape[-2])
        # Saves what a fused kernel saves: the query, and the size of an output.
        return query * key.mean() * value.mean()

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield operations
    finally:
        nn.functional.scaled_dot_product_attention = original


def _mllm_bytes(config: Config, reader: Reader) -> float:
    width = _width(config.mllm.precision)
    return reader.parameters * width - (reader.linear * (width - NF4_BYTES) if config.mllm.nf4 else 0)


def _width(precision: str) -> int:
    """Bytes of a value."""
    return DTYPES[precision].itemsize


def _samples_at_once(config: Config, section) -> int:
    """Samples that a device holds at once."""
    return max(1, section.batch // (config.devices * section.accumulate))


def _samples(section) -> str:
    return f"{section.steps:,} steps x {section.batch:,} = {section.steps * section.batch:,} samples"


def _memory(weights: float, trained: float, activations: float) -> str:
    total = weights + trained + activations
    parts = {"weights": weights, "trained weights and optimiser": trained, "activations": activations}
    return f"{total / GIB:.1f} GiB a device: " + ", ".join(f"{name} {v / GIB:.1f}" for name, v in parts.items() if v)


def _time(config: Config, flops: float, devices: int | None = None) -> str:
    seconds = flops / (config.tflops * 1e12 * (devices or config.devices))
    work = f"{flops / 1e18:,.1f} EFLOP" if flops > 1e18 else f"{flops / 1e15:.3g} PFLOP"
    return f"{work}, {_hours(seconds)}"


def _hours(seconds: float) -> str:
    return f"about {seconds / 3600:,.1f} h" if seconds > 3600 else f"about {seconds / 60:,.1f} min"
