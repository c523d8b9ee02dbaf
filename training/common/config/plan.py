"""`--plan`: what every stage of a configuration needs, from shapes alone.

Models are built on the meta device and run there once: torch counts the operations and the tensors that autograd keeps.
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
from prefgen.mllm.families import family_parts

from . import shapes
from .schema import Config

GIB = 2**30
PICTURES, USERS = 990_998, 50_153  # the paper's set, where none is there to be counted
WORDS, QUESTION = 6, 60  # text tokens: beside a picture, and of the question with its answer
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
NF4 = 0.56  # bytes of a 4-bit weight with its scales
TRAINED, EMA = 16, 4  # bytes of a trained weight: itself, its gradient, Adam's two moments, all in fp32
ALONE = ("atelier", "extract", "probe_layers", "export")  # stages of one process
ATELIER = ("pool", "vae", "clip", "judge", "unet", "mllm_vision")


@dataclass(frozen=True)
class Cost:
    """flops: of one forward pass. kept: values that autograd keeps for the backward pass, without the weights."""

    flops: float
    kept: float


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
    stages = [*_atelier(config), *_stages(config)]
    launch = "python" if config.devices == 1 else "accelerate launch --config_file training/configs/accelerate/ddp.yaml"
    lines = [
        f"{name}: {config.hardware}",
        f"expected: {config.expected}",
        f"Estimated from shapes; {config.devices} device(s) that reach {config.tflops:g} TFLOP/s each are assumed.",
    ]
    for stage, facts in stages:
        alone = "python" if stage.split(".")[0] in ALONE else launch
        lines += ["", stage, f"  {alone} -m training.{stage} --config {name}", *(f"  {fact}" for fact in facts)]
    return "\n".join(lines)


def _atelier(config: Config) -> Iterator[tuple[str, list[str]]]:
    """The stages that make the atelier's base models."""
    if config.base.family != "atelier":
        return
    for stage in ATELIER:
        section = getattr(config.atelier, stage)
        if stage == "pool":
            yield "atelier.pool", [f"{section.count:,} pictures, {section.count * 128 * 128 * 3 / GIB:.1f} GiB on disk"]
        else:
            yield f"atelier.{stage}", [_seen(section)]


def _stages(config: Config) -> Iterator[tuple[str, list[str]]]:
    reader = _reader(config)
    if reader is None:
        unknown = [f"mllm.path {config.mllm.path} isn't there, and no published shape has its name: no estimate"]
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
    section, mllm = config.train_mllm, config.mllm
    tokens = _history_tokens(reader, 2 * section.pictures + 1)
    piece = _piece(config, section)
    forward = _decoder(reader, tokens)
    trained = reader.lora if mllm.lora else shapes.parameters(reader.decoder)
    kept = forward.kept
    if mllm.gradient_checkpointing:  # the inputs of all layers, and the inside of one
        kept = kept / reader.layers + reader.layers * tokens * reader.width
    # Backward is one more pass for the activations, one for the trained weights, one for what wasn't kept.
    passes = 2 + (not mllm.lora) + mllm.gradient_checkpointing
    flops = section.steps * section.batch * (passes * forward.flops + _eyes(reader, 2 * section.pictures + 1))
    kind = f"LoRA of {trained / 1e6:.1f} M weights in {reader.modules} modules" if mllm.lora else "trained whole"
    return [
        f"{reader.parameters / 1e6:,.0f} M weights, {kind}; {_seen(section)} of about {tokens:,} tokens",
        _memory(_mllm_bytes(config, reader), trained * TRAINED, piece * kept * WIDTH[mllm.precision])
        + f", {piece} sample(s) at once",
        _time(config, flops),
    ]


def _extract(config: Config, reader: Reader) -> list[str]:
    section = config.extract
    users = section.users or USERS
    count, tokens = users * section.histories, _history_tokens(reader, 2 * section.pictures)
    flops = count * (_decoder(reader, tokens).flops + _eyes(reader, 2 * section.pictures))
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
    reads = section.users * section.histories * (3 + 3 + 5)  # the reported group is read with a stranger's history too
    flops = reads * _decoder(reader, tokens).flops + _eyes(reader, reads * (2 * section.pictures + 1) // 3)
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
        f"{weights / 1e6:.1f} M weights; {_seen(section)} against a bank of {section.bank:,}",
        _memory(states, weights * TRAINED, kernels),
        "minutes on any device",
    ]


def _train_user_attention(config: Config, reader: Reader) -> list[str]:
    section, base = config.train_user_attention, config.base
    unet = shapes.unet(config)
    width = shapes.TEXT_WIDTH[base.family] + reader.width + shapes.VISION_WIDTH[base.family]
    branch, projection = branch_parameters(unet), _projection(width, unet.config.cross_attention_dim, section.tokens)
    piece, side = _piece(config, section), base.pixels // 8
    forward = _unet_cost(unet, side)
    kept = forward.kept / (5 if base.gradient_checkpointing else 1)  # about a block in five is held at once
    passes = 2 + base.gradient_checkpointing + (section.distil > 0)
    weights = shapes.parameters(unet)
    users = min(config.extract.users or USERS, USERS)
    pictures = min(users * PICTURES // USERS // 2, PICTURES // 2)
    frozen = weights if section.cache_text else weights + shapes.TEXT_ENCODERS.get(base.family, 0)
    facts = [
        f"UNet of {weights / 1e6:,.1f} M weights, frozen; K and V of the branch {branch / 1e6:.1f} M, projection of "
        f"the user vector {projection / 1e6:.1f} M; {_seen(section)} at {base.pixels} px",
        _memory(
            frozen * WIDTH[base.precision],
            (branch + projection) * (TRAINED + EMA),
            piece * kept * WIDTH[base.precision],
        )
        + f", {piece} picture(s) at once",
        _time(config, section.steps * section.batch * passes * forward.flops),
    ]
    if base.family == "atelier":
        return facts
    states = 77 * unet.config.cross_attention_dim * 2
    latents, texts = pictures * 4 * side * side * 2, 2 * pictures * states if section.cache_text else 0
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


def _projection(width: int, cross_attention_dim: int, tokens: int) -> int:
    with torch.device("meta"):
        return shapes.parameters(UserProjection(width, cross_attention_dim, tokens))


def _reader(config: Config) -> Reader | None:
    model = shapes.mllm(config)
    if model is None:
        return None
    family = family_parts(model)
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
    return pictures * (reader.tokens + WORDS) + QUESTION


def _eyes(reader: Reader, pictures: int) -> float:
    """Operations of the vision tower on so many pictures."""
    return 2.0 * reader.vision * reader.patches * pictures


def _decoder(reader: Reader, tokens: int) -> Cost:
    """One sample through the decoder."""
    inputs = torch.empty(1, tokens, reader.width, device="meta", requires_grad=True)
    mask = torch.empty(1, 1, tokens, tokens, device="meta", dtype=torch.bool)  # whole, so that no value is looked at
    return cost_of(lambda: reader.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False), reader.decoder)


def _unet_cost(unet: nn.Module, side: int) -> Cost:
    """One latent through the UNet, whose text states stand for what the gradient flows to."""

    def tensor(*shape, **options):
        return torch.empty(*shape, device="meta", **options)

    states = tensor(1, 77, unet.config.cross_attention_dim, requires_grad=True)
    added = None
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": tensor(1, 1280), "time_ids": tensor(1, 6)}
    latent, timestep = tensor(1, unet.config.in_channels, side, side), torch.zeros(1, device="meta")
    return cost_of(lambda: unet(latent, timestep, states, added_cond_kwargs=added), unet)


def _vae_cost(config: Config) -> float:
    """Operations of encoding one picture."""
    vae = shapes.vae(config)
    picture = torch.empty(1, 3, config.base.pixels, config.base.pixels, device="meta")
    return cost_of(lambda: vae.encoder(picture), vae).flops


def cost_of(forward: Callable[[], object], weights: nn.Module) -> Cost:
    """Run a forward pass on the meta device and count. Attention counts as fused: its matrix is never kept."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen.setdefault(storage._cdata, storage)
        return tensor

    with _fused_attention() as attention, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
    return Cost(counter.get_total_flops() + sum(attention), sum(storage.nbytes() for storage in seen.values()) / 4)


@contextmanager
def _fused_attention() -> Iterator[list[int]]:
    """Stands in for torch's attention, which has no fused kernel on the meta device. Yields its operations."""
    original, operations = nn.functional.scaled_dot_product_attention, []

    def attention(query, key, value, *_, **__):
        operations.append(4 * query.numel() * key.shape[-2])
        return (
            query * key.mean() * value.mean()
        )  # keeps what a fused kernel keeps: the query, and the size of an output

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield operations
    finally:
        nn.functional.scaled_dot_product_attention = original


def _mllm_bytes(config: Config, reader: Reader) -> float:
    width = WIDTH[config.mllm.precision]
    return reader.parameters * width - (reader.linear * (width - NF4) if config.mllm.nf4 else 0)


def _piece(config: Config, section) -> int:
    """Samples that a device holds at once."""
    return max(1, section.batch // (config.devices * section.accumulate))


def _seen(section) -> str:
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
