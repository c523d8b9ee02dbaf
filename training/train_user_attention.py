"""Stage 12: train the user cross-attention branch and the projection of the user vector.

    python -m training.train_user_attention --runs runs/atelier

UNet, VAE and encoders are frozen; K and V of the branch start from the UNet's own. The student sees the neutral
prompt and the user; two targets share the weight: the noise of a picture that this user likes, and the frozen UNet's
own prediction for the prompt with the user's taste written into it (the oracle, which is less noisy than any picture
and shortens training many times). The user vector's parts, the whole user and the text are dropped at times, so that
the artist's weights and guidance work; a dropped user must predict what the plain UNet predicts. With `--set
train_user_attention.parts=[image]` it is an image-only adapter: the same branch on the CLIP embedding alone.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from prefgen.adapter import FORMAT_VERSION, AdapterHeader, UserAdapter, save_adapter
from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.atelier import captions
from prefgen.atelier.models import (
    MLLM_FOLDER,
    UNET_CONFIG,
    WEIGHTS,
    alphas_cumprod,
    clip_tokenizer,
    load_clip,
    load_unet_diffusers,
)
from prefgen.branch import user_residual
from prefgen.fusion import UserProjection
from prefgen.mllm.model import PreferenceMLLM

from . import core
from .atelier.clip import mapping, text_features, tokenize
from .atelier.pool import PicturePool
from .atelier.unet import cached_latents, noised
from .config.command import arguments
from .config.schema import PARTS
from .extract import Extracted
from .users_pool import Dealer, users_of


class UserAttention(AttnProcessor):
    """Text cross-attention plus the user branch, for diffusers blocks. `keys_values` is set before each UNet call."""

    def __init__(self):
        super().__init__()
        self.keys_values = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        out = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key, attention_mask), value))
        if self.keys_values is not None:
            k, v = (t.to(out.dtype) for t in self.keys_values)
            metadata = {"heads": attn.heads, "weight": 1.0, "attention": product_attention}
            out = out + user_residual(out, attn.batch_to_head_dim(query), metadata, k, v)
        return attn.to_out[1](attn.to_out[0](out))


def product_attention(q, k, v, heads, **_):
    """Plain softmax attention [B, T, heads * d]: with four keys it beats the fused kernel, backward above all."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def install(unet) -> list[UserAttention]:
    """Put the branch into every cross-attention of a diffusers UNet; returned in file order (down, up, mid)."""
    processors = {
        name: UserAttention() if name.endswith("attn2.processor") else AttnProcessor() for name in unet.attn_processors
    }
    unet.set_attn_processor(dict(processors))  # it empties the one it is given
    return [processors[name] for name in unet.attn_processors if name.endswith("attn2.processor")]


def unet_projections(unet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The UNet's own (to_k, to_v) weights of every cross-attention, in file order."""
    return [
        (m.to_k.weight.detach().clone(), m.to_v.weight.detach().clone())
        for name, m in ((n, unet.get_submodule(n.removesuffix(".processor"))) for n in unet.attn_processors)
        if name.endswith("attn2.processor")
    ]


def new_adapter(args, unet) -> UserAdapter:
    """An adapter around the trained aligner and normalisers, its K and V copied from the UNet."""
    state = core.last_state(args.runs / "train_alignment")
    layers = json.loads((args.runs / "probe_layers" / "layers.json").read_text())
    extracted = Extracted(args.runs)
    layer_count, width = state["norm"]["mean"].shape
    text_width, image_width = 128, extracted.images.shape[1]
    aligner = SemanticAligner(layer_count, width, text_width)
    aligner.load_state_dict(state["model"])
    sem_norm, core_norm = LayerStandardiser(layer_count, width), LayerStandardiser(1, width)
    sem_norm.load_state_dict(state["norm"])
    core_norm.fit(extracted.hidden[:, [layers["core_layer"]]])
    projections = unet_projections(unet)
    x = UNET_CONFIG["cross_attention_dim"]
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="prefgen",
        base_family="atelier",
        semantic_width=text_width,
        core_width=width,
        image_width=image_width,
        cross_attention_dim=x,
        tokens=args.tokens,
        block_widths=[k.shape[0] for k, _ in projections],
        mllm=PreferenceMLLM.load(MLLM_FOLDER).fingerprint | layers,
        clip_vision={"name": "atelier", "width": image_width, "preprocessing": "bicubic 128, mean 0.5, std 0.5"},
        training={k: args.fingerprint[k] for k in ("steps", "batch", "lr", "distil", "parts", "seed")},
    )
    adapter = UserAdapter(
        header, UserProjection(text_width + width + image_width, x, args.tokens), aligner, sem_norm, core_norm
    )
    for (k, v), to_k, to_v in zip(projections, adapter.to_k_ip, adapter.to_v_ip, strict=True):
        to_k.weight.data.copy_(k)
        to_v.weight.data.copy_(v)
    return adapter


@torch.no_grad()
def user_vectors(adapter: UserAdapter, extracted: Extracted) -> torch.Tensor:
    """e_u of every extracted history, [n, C + D + I]."""
    return torch.cat([adapter.semantic(extracted.hidden), adapter.core(extracted.hidden), extracted.images], 1)


def drop_parts(vectors: torch.Tensor, widths: list[int], part: float, user: float) -> torch.Tensor:
    """Zero each part with probability `part`, everything with probability `user`."""
    keep = (torch.rand(len(vectors), len(widths)) >= part) & (torch.rand(len(vectors), 1) >= user)
    return vectors * keep.repeat_interleave(torch.tensor(widths), 1)


def main() -> None:
    args = arguments("train_user_attention", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    pool, extracted = PicturePool(args.runs), Extracted(args.runs)
    latents, alphas = cached_latents(args, pool), alphas_cumprod()
    clip, tokenizer, unet = load_clip(), clip_tokenizer(), load_unet_diffusers()
    unet.requires_grad_(False)
    adapter = new_adapter(args, unet)
    branch = install(unet)
    header = adapter.header
    widths = [header.semantic_width, header.core_width, header.image_width]
    kept = torch.tensor([float(part in args.parts) for part in PARTS])
    vectors = user_vectors(adapter, extracted) * kept.repeat_interleave(torch.tensor(widths))
    dealer, people = Dealer(pool.labels[:, 2:]), users_of("train", int(extracted.owners.max()) + 1)
    trained = nn.ModuleList([adapter.projection, adapter.to_k_ip, adapter.to_v_ip])
    optimiser = torch.optim.AdamW(core.parameter_groups(trained, 0.01), betas=(0.9, 0.99))
    ema = core.Ema(trained, args.ema)
    run.resume(model=trained, optimiser=optimiser, ema=ema)

    def states_of(texts):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return text_features(clip, tokenize(tokenizer, texts))[0].float()

    for step in run.steps(args.steps):
        rng = np.random.default_rng([args.seed, step])
        rows = rng.choice(len(vectors), args.batch, replace=False)
        pictures, neutral, oracle = [], [], []
        for row in rows:
            person = people[extracted.owners[row]]
            taste = person.tastes[rng.integers(len(person.tastes))]
            index = int(dealer.liked(person, taste, 1, rng)[0])
            subject, prop, _ = mapping(pool.labels[index])
            empty = rng.random() < args.drop_text
            pictures.append(index)
            neutral.append("" if empty else captions.neutral(subject, prop))
            oracle.append(captions.enriched(subject, prop, dict(taste.liked), rng))
        vector = drop_parts(vectors[rows], widths, args.drop_part, args.drop_user)
        dropped = vector.abs().sum(1) == 0
        oracle = [n if d or not n else o for n, o, d in zip(neutral, oracle, dropped.tolist(), strict=True)]
        # No text means no oracle text either: those rows learn from pictures alone.
        teachable = torch.tensor([bool(n) for n in neutral])
        timesteps = torch.randint(0, len(alphas), (args.batch,))
        noisy, target = noised(latents[pictures].float(), alphas, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            for processor in branch:
                processor.keys_values = None
            with torch.inference_mode():
                teacher = unet(noisy, timesteps, states_of(oracle)).sample.float()
            for processor, keys_values in zip(branch, adapter.keys_values(vector), strict=True):
                processor.keys_values = keys_values
            student = unet(noisy, timesteps, states_of(neutral).clone()).sample.float()
        picture_loss = F.mse_loss(student, target)
        distil_loss = F.mse_loss(student[teachable], teacher.clone()[teachable])
        loss = (1 - args.distil) * picture_loss + args.distil * distil_loss
        norm = core.optimise(loss, optimiser, core.cosine(step, args.steps, args.lr, 200))
        ema.update(step)
        run.log(loss=loss, picture=picture_loss, distil=distil_loss, grad_norm=norm)

    trained.load_state_dict(ema.shadow)
    adapter.eval()
    save_adapter(adapter, WEIGHTS / "adapter.safetensors")
    run.finish(**evaluate(run, adapter, args.users))


def evaluate(run, adapter: UserAdapter, count: int) -> dict[str, float]:
    """Alignment and named subjects on test users and held-out prompts, one picture each; histories drawn by the
    renderer and read by the real encoder."""
    from .evaluate.metrics import alignment, read
    from .evaluate.painter import Painter, paint_row, requests
    from .evaluate.rows import BASIC, ROWS

    painter, people, figures = Painter(adapter), users_of("test", count), {}
    asked = requests(people, 1)
    for name in BASIC:
        pictures = torch.cat(list(paint_row(painter, ROWS[name], people, asked)))
        core.picture_grid(pictures, run.folder / "samples" / f"{name}.png")
        readings = read(painter, pictures)
        figures[name] = float(alignment(readings, people, asked).mean())
        named = [r["subject"] == subject for r, (_, subject, _) in zip(readings, asked, strict=True)]
        figures[f"{name}_subject"] = float(np.mean(named))
    gain = figures["oracle"] - figures["none"]  # an untrained UNet gains nothing
    return figures | {"gain_share": (figures["prefgen"] - figures["none"]) / gain if gain else None}


if __name__ == "__main__":
    main()
