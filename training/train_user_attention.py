"""Stage 12: train the user cross-attention branch and the projection of the user vector.

    python -m training.train_user_attention --config sdxl_24gb

UNet, VAE and encoders are frozen; K and V of the branch start from the UNet's own or from a public IP-Adapter. The
student sees the neutral prompt and the user; two targets share the weight: the noise of a picture that this user likes,
and the frozen UNet's own prediction for the prompt with the user's taste written into it (the oracle, which is less
noisy than any picture and shortens training many times; it needs a data set that knows tastes in words). The user
vector's parts, the whole user and the text are dropped at times, so that the artist's weights and guidance work; a
dropped user must predict what the plain UNet predicts. With `--set train_user_attention.parts=[image]` it is an
image-only adapter: the same branch on the CLIP embedding alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.adapter import UserAdapter, load_adapter
from prefgen.atelier.models import WEIGHTS

from . import core
from .bases import Base, BaseError, Text, load_base
from .caches import latents_of, texts_of
from .config.command import arguments
from .config.schema import PARTS
from .data.errors import DataError
from .export import new_adapter, trained_parts, write
from .extract import Extracted
from .histories import DataSetHistories, Histories, Wanted, histories_of
from .sampling import min_snr, noised
from .user_branch import install, own_projections, set_users

PREVIEWS, PREVIEW_STEPS, PREVIEW_GUIDANCE = 4, 20, 4.0


def drop_parts(vectors: torch.Tensor, widths: list[int], part: float, user: float) -> torch.Tensor:
    """Zero each part with probability `part`, everything with probability `user`."""
    keep = (torch.rand(len(vectors), len(widths)) >= part) & (torch.rand(len(vectors), 1) >= user)
    return vectors * keep.repeat_interleave(torch.tensor(widths), 1)


@dataclass
class Cached:
    """What the frozen encoders say of pictures and prompts: latents of all pictures that are wanted; texts from the
    disk, or from the base where there is no end of them."""

    base: Base
    row: dict[int, int]
    arrays: dict[str, np.ndarray]
    text_row: dict[str, int] | None = None
    text_arrays: dict[str, np.ndarray] | None = None

    @classmethod
    def of(cls, base: Base, world: Histories, users: list[int], args) -> Cached:
        if not isinstance(world, DataSetHistories):
            cache, arrays = latents_of(base, world, range(len(world)), args.runs)
            return cls(base, cache.row, arrays)
        wanted = [world.as_wanted(user, int(i)) for user in users for i in world.wanted_pictures(user)]
        cache, arrays = latents_of(base, world, sorted({w.picture for w in wanted}), args.runs)
        if not args.cache_texts:
            return cls(base, cache.row, arrays)
        said = {"", *(w.prompt for w in wanted)} | {w.enriched for w in wanted if w.enriched and args.distil}
        texts, text_arrays = texts_of(base, sorted(said), args.runs)
        base.drop_encoders(keep_vae=args.pictures_every > 0)
        return cls(base, cache.row, arrays, texts.row, text_arrays)

    def pictures(self, numbers: list[int], device) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents float32 [B, c, h, w], geometry [B, 4])."""
        rows = [self.row[n] for n in numbers]
        return (
            torch.from_numpy(self.arrays["latents"][rows]).float().to(device),
            torch.from_numpy(self.arrays["geometry"][rows]),
        )

    def text(self, texts: list[str], device) -> Text:
        if self.text_row is None:
            text = self.base.text(texts)
            return Text(text.states.clone(), None if text.pooled is None else text.pooled.clone()).to(device)
        rows, arrays = [self.text_row[t] for t in texts], self.text_arrays
        pooled = torch.from_numpy(arrays["pooled"][rows]) if "pooled" in arrays else None
        return Text(torch.from_numpy(arrays["states"][rows]), pooled).to(device)


def predict(base: Base, branch, noisy, timesteps, text: Text, geometry, keys_values) -> torch.Tensor:
    """The UNet's prediction, float32 [B, c, h, w], with these users' K and V or none."""
    set_users(branch, keys_values)
    with torch.autocast(noisy.device.type, base.autocast, enabled=base.autocast != torch.float32):
        states = text.states.to(next(base.unet.parameters()).dtype)
        return base.unet(
            noisy.to(states.dtype), timesteps, states, added_cond_kwargs=base.added(text, geometry)
        ).sample.float()


def main() -> None:
    args = arguments("train_user_attention", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    try:
        train(args, run)
    except (BaseError, DataError) as error:
        raise SystemExit(str(error)) from error


def train(args, run: core.Run) -> None:
    world, extracted = histories_of(args.config, args.runs), Extracted(args.runs)
    owners = extracted.owners
    base = load_base(args.config)
    adapter = new_adapter(args, base, extracted)
    header = adapter.header
    start_projections(adapter, base, args.config.base.ip_adapter)
    device = run.accelerator.device
    base.to(device)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    cached = Cached.of(base, world, sorted(set(owners.tolist())), args)
    branch, alphas = install(base.unet), base.alphas
    widths = [header.semantic_width, header.core_width, header.image_width]
    kept = torch.tensor([float(part in args.parts) for part in PARTS])
    vectors = user_vectors(adapter, extracted) * kept.repeat_interleave(torch.tensor(widths))
    trained = trained_parts(adapter).to(device)
    optimiser = torch.optim.AdamW(core.parameter_groups(trained, 0.01), betas=(0.9, 0.99))
    ema = core.Ema(trained, args.ema)
    run.resume(model=trained, optimiser=optimiser, ema=ema)

    for step in run.steps(args.steps):
        rng = np.random.default_rng([args.seed, step])
        rows = rng.choice(len(vectors), args.batch, replace=len(vectors) < args.batch)
        samples = [wanted(world, int(owners[row]), rng, args.drop_text) for row in rows]
        vector = drop_parts(vectors[rows], widths, args.drop_part, args.drop_user)
        dropped = vector.abs().sum(1) == 0
        # No text means no oracle text either: those rows learn from pictures alone, as do tastes without words.
        teachable = torch.tensor([bool(s.prompt and s.enriched) for s in samples])
        timesteps = torch.randint(0, len(alphas), (args.batch,))
        latents, geometry = cached.pictures([s.picture for s in samples], device)
        noisy, target = noised(latents, alphas, timesteps, base.prediction)
        neutral = cached.text([s.prompt for s in samples], device)
        at = timesteps.to(device)
        student = predict(base, branch, noisy, at, neutral, geometry, adapter.keys_values(vector.to(device)))
        weight = torch.ones(args.batch)
        if args.min_snr is not None:
            weight = min_snr(alphas, timesteps, base.prediction, args.min_snr)
        picture_loss = (weight.to(device) * (student - target).square().mean((1, 2, 3))).mean()
        loss, figures = picture_loss, {"picture": picture_loss}
        if args.distil and teachable.any():
            told = [
                s.prompt if d or not t else s.enriched
                for s, d, t in zip(samples, dropped.tolist(), teachable.tolist(), strict=True)
            ]
            with torch.no_grad():
                teacher = predict(base, branch, noisy, at, cached.text(told, device), geometry, None)
            distil = F.mse_loss(student[teachable.to(device)], teacher[teachable.to(device)])
            loss = (1 - args.distil) * picture_loss + args.distil * distil
            figures["distil"] = distil
        norm = core.optimise(loss, optimiser, core.cosine(step, args.steps, args.lr, args.warmup))
        ema.update(step)
        run.log(loss=loss, **figures, grad_norm=norm)
        if args.pictures_every and (step + 1) % args.pictures_every == 0:
            preview(run, base, branch, adapter, ema, vectors, cached, world, owners)

    path = WEIGHTS / "adapter.safetensors" if base.family == "atelier" else run.folder / "adapter.safetensors"
    write(args, path)
    run.finish(**(evaluate(run, load_adapter(path), args.users) if base.family == "atelier" else {"file": path.name}))


def start_projections(adapter: UserAdapter, base: Base, ip_adapter) -> None:
    """K and V of the branch: the UNet's own, or those of a public IP-Adapter file for the same base."""
    pairs = own_projections(base.unet)
    if ip_adapter is not None:
        given = load_adapter(ip_adapter)
        shapes = [tuple(k.shape) for k, _ in pairs]
        if [tuple(k.weight.shape) for k in given.to_k_ip] != shapes:
            raise BaseError(f"{ip_adapter} is no IP-Adapter for {base.family}: its blocks have other widths.")
        pairs = [(k.weight, v.weight) for k, v in zip(given.to_k_ip, given.to_v_ip, strict=True)]
    for (k, v), to_k, to_v in zip(pairs, adapter.to_k_ip, adapter.to_v_ip, strict=True):
        to_k.weight.data.copy_(k)
        to_v.weight.data.copy_(v)


def wanted(world: Histories, user: int, rng: np.random.Generator, drop_text: float) -> Wanted:
    """A picture that the user likes; its prompt is empty at times."""
    found = world.wanted(user, rng)
    return Wanted(found.picture, "", None) if rng.random() < drop_text else found


@torch.no_grad()
def user_vectors(adapter: UserAdapter, extracted: Extracted) -> torch.Tensor:
    """e_u of every extracted history, [n, C + D + I]."""
    return torch.cat([adapter.semantic(extracted.hidden), adapter.core(extracted.hidden), extracted.images], 1)


@torch.no_grad()
def preview(run, base: Base, branch, adapter, ema, vectors, cached: Cached, world, owners) -> None:
    """A grid of samples, a row a user: without and with the user; the same noise and prompts every time."""
    from diffusers import DDIMScheduler

    device = run.accelerator.device
    chosen = np.unique(owners, return_index=True)[1][:PREVIEWS]
    prompts = [world.wanted(int(owners[row]), np.random.default_rng(0)).prompt for row in chosen]
    trained = trained_parts(adapter)
    current = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.load_state_dict(ema.shadow)
    scheduler = DDIMScheduler(
        len(base.alphas),
        trained_betas=(1 - base.alphas / torch.cat([torch.ones(1), base.alphas[:-1]])).numpy(),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=base.prediction,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(PREVIEW_STEPS)
    count = len(prompts)
    text, off = cached.text(prompts, device), cached.text([""] * count, device)
    both = Text(
        torch.cat([off.states, text.states]), None if off.pooled is None else torch.cat([off.pooled, text.pooled])
    )
    geometry = torch.tensor([[base.pixels, base.pixels, 0, 0]] * 2 * count)
    rows = []
    for users in (torch.zeros(count, vectors.shape[1]), vectors[chosen]):
        keys_values = adapter.keys_values(torch.cat([torch.zeros_like(users), users]).to(device))
        latents = torch.stack(
            [
                torch.randn(cached.arrays["latents"].shape[1:], generator=torch.Generator().manual_seed(i))
                for i in range(count)
            ]
        ).to(device)
        for t in scheduler.timesteps:
            guided = predict(base, branch, torch.cat([latents] * 2), t.to(device), both, geometry, keys_values)
            none, some = guided.chunk(2)
            latents = scheduler.step(none + PREVIEW_GUIDANCE * (some - none), t, latents).prev_sample
        rows.append(base.decode(latents))
    trained.load_state_dict(current)
    pictures = torch.stack(rows, 1).flatten(0, 1)
    core.picture_grid(pictures, run.folder / "samples" / f"{run.step + 1:06d}.png", columns=2)


def evaluate(run, adapter: UserAdapter, count: int) -> dict[str, float]:
    """Alignment and named subjects on test users and held-out prompts, one picture each; histories drawn by the
    renderer and read by the real encoder."""
    from .evaluate.metrics import alignment, read
    from .evaluate.painter import Painter, paint_row, requests
    from .evaluate.rows import BASIC, ROWS
    from .users_pool import users_of

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
