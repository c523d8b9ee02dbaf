"""Stage 12: train the user cross-attention branch and the projection of the user vector.

    python -m training.train_user_attention --runs runs/atelier
    accelerate launch -m training.train_user_attention --config sdxl_8x80gb

UNet, VAE and encoders are frozen; K and V of the branch start from the UNet's own, or from a public IP-Adapter's. The
student sees the neutral prompt and the user; two targets share the weight: the noise of a picture that this user likes,
and the frozen UNet's own prediction for the prompt with the user's taste written into it (the oracle, which is less
noisy than any picture and shortens training many times). The user vector's parts, the whole user and the text are
dropped at times, so that the artist's weights and guidance work; a dropped user must predict what the plain UNet
predicts. With `--set train_user_attention.parts=[image]` it is an image-only adapter: the same branch on the CLIP
embedding alone.

Latents, and for a data set the text states of every prompt, are computed once and mapped from the run's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.adapter import UserAdapter
from prefgen.adapter_file import save_adapter
from prefgen.atelier.models import WEIGHTS

from .common.adapters import new_adapter, trained_adapter, trained_parts
from .common.bases import Base, Text, load_base
from .common.cache import cached, digest_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import PARTS, TrainUserAttention
from .common.errors import exit_with_message
from .common.files import picture_grid
from .common.optim import Ema, cosine, parameter_groups
from .common.order import step_seed
from .common.precision import full_precision
from .common.run import Run
from .common.sampling import decode, guided_sample, seeded_noise
from .common.stage_outputs import ExtractedUsers, first_heldout
from .common.user_branch import connect, install
from .data.atelier_users import users_of
from .data.picture_pool import pool_latents
from .data.worlds import Target, World, open_world, painted_smaller

SHOWN, SHOWN_STEPS, GUIDANCE = 4, 20, 5.0  # the grids: users, sampling steps
TEXTS, PICTURES = 64, 16  # computed at once for the caches


@torch.no_grad()
def user_vectors(adapter: UserAdapter, extracted: ExtractedUsers, piece: int = 4096) -> torch.Tensor:
    """e_u of every extracted history, [n, C + D + I], fp32."""
    rows = []
    for start in range(0, len(extracted.owners), piece):
        hidden, images = (
            torch.from_numpy(np.array(array[start : start + piece], np.float32))
            for array in (extracted.hidden, extracted.images)
        )
        rows.append(torch.cat([adapter.semantic(hidden), adapter.core(hidden), images], 1))
    return torch.cat(rows)


def drop_parts(vectors: torch.Tensor, widths: list[int], part: float, user: float) -> torch.Tensor:
    """Zero each part with probability `part`, everything with probability `user`."""
    keep = (torch.rand(len(vectors), len(widths)) >= part) & (torch.rand(len(vectors), 1) >= user)
    return vectors * keep.repeat_interleave(torch.tensor(widths), 1)


class Latents:
    """Latents [B, c, h, w] and sizes [B, 4] (see `Base.added_conditions`) of pictures by their numbers in the world."""

    def __init__(
        self, args: StageArgs[TrainUserAttention], base: Base, histories: World, wanted: list[Target] | None, run
    ):
        if wanted is None:  # the pool of the atelier, whole; another stage may have made them
            self.numbers, self.sizes = np.arange(len(histories)), None
            self.latents = pool_latents(args.runs, histories.pool, run.rank, run.world_size)
            self.shape = self.latents.shape[1:]
            return
        self.numbers = np.unique([w.picture for w in wanted])
        config = args.config.base
        key = {"world": histories.name, "base": str(config.path), "pixels": config.pixels}
        key |= {"vae": digest_of(base.vae), "data": histories.digest}
        key |= {"pictures": hashlib.sha256(self.numbers.tobytes()).hexdigest()}
        side = config.pixels // 2 ** (len(base.vae.config.block_out_channels) - 1)
        self.shape = (base.vae.config.latent_channels, side, side)
        columns = {"latents": (self.shape, np.float16), "sizes": ((4,), np.int32)}

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            latents, sizes = base.latents(histories.pictures(self.numbers[start:stop], long_side=None))
            return {"latents": latents.numpy(), "sizes": sizes}

        arrays = cached(args.runs, "latents", len(self.numbers), columns, key, fill, PICTURES, run.rank, run.world_size)
        self.latents, self.sizes = arrays["latents"], arrays["sizes"]

    def of(self, pictures: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = np.searchsorted(self.numbers, pictures)
        latents = torch.as_tensor(np.asarray(self.latents[rows])).float()
        return latents, None if self.sizes is None else torch.from_numpy(self.sizes[rows])


class CachedTexts:
    """Text states of every prompt that training may ask for, mapped from the disk."""

    def __init__(self, args: StageArgs[TrainUserAttention], base: Base, histories: World, wanted: list[Target], run):
        enriched = [w.enriched for w in wanted if w.enriched] if args.section.distil else []
        texts = sorted({"", *(w.prompt for w in wanted), *enriched})
        self.rows = {text: i for i, text in enumerate(texts)}
        config, first = args.config.base, base.encode_text([""])
        key = {"world": histories.name, "base": str(config.path), "precision": config.precision}
        key |= {"encoders": digest_of(*(model for _, model in base.encoders))}
        key |= {"texts": hashlib.sha256("\n".join(texts).encode()).hexdigest()}
        columns = {"text_states": (tuple(first.states.shape[1:]), np.float16)}
        if first.pooled is not None:
            columns["text_pooled"] = (tuple(first.pooled.shape[1:]), np.float16)

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            text = base.encode_text(texts[start:stop])
            found = {"text_states": text.states, "text_pooled": text.pooled}
            return {name: found[name].cpu().half().numpy() for name in columns}

        self.arrays = cached(args.runs, "texts", len(texts), columns, key, fill, TEXTS, run.rank, run.world_size)
        self.device = base.device

    def __call__(self, texts: list[str]) -> Text:
        rows = [self.rows[text] for text in texts]
        states, pooled = (self.arrays.get(name) for name in ("text_states", "text_pooled"))
        read = [None if array is None else torch.from_numpy(array[rows]).float() for array in (states, pooled)]
        return Text(*(None if array is None else array.to(self.device) for array in read))


def main() -> None:
    args = arguments(TrainUserAttention, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    config, device, first = args.config, run.accelerator.device, run.rank == 0
    histories, extracted = open_world(config, args.runs), ExtractedUsers(args.runs)
    extracted.check_world(histories.name)
    if config.data.path is not None and (fault := painted_smaller(config.data.path, config.base.pixels)):
        raise SystemExit(f"{args.stage}: {fault}")
    if config.base.precision == "fp16" and run.accelerator.scaler is None:
        raise SystemExit(
            "base.precision fp16: gradients underflow without a loss scaler; take bf16, or start with `accelerate "
            "launch --mixed_precision fp16`."
        )
    base = load_base(config, device)
    adapter = new_adapter(args, base)
    branch = install(base.unet, fused=base.family != "atelier")
    if config.base.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    header = adapter.header
    widths = [header.semantic_width, header.core_width, header.image_width]
    kept = torch.tensor([float(part in section.parts) for part in PARTS])
    vectors = user_vectors(adapter, extracted) * kept.repeat_interleave(torch.tensor(widths))
    users = np.unique(extracted.owners)
    wanted = histories.all_targets(users.tolist())
    with run.timer("caches"):
        latents = Latents(args, base, histories, wanted, run)
        texts = base.encode_text
        if wanted is not None and section.cache_text:
            texts = CachedTexts(args, base, histories, wanted, run)
            base.free_encoders()
        base.vae.to("cpu")  # it waits there for the pictures to be shown
    # A data set keeps the users that the alignment was measured on for the figures at the end.
    heldout = np.zeros(len(vectors), bool)
    if wanted is not None:
        heldout = extracted.owners >= users[first_heldout(len(users))]
    rows = np.flatnonzero(~heldout)
    if len(rows) < section.batch:
        raise SystemExit(
            f"{args.stage}: {len(rows)} histories can't fill a batch of {section.batch}: extract more users."
        )

    trained = trained_parts(adapter)
    optimiser = torch.optim.AdamW(parameter_groups(trained, 0.01), betas=(0.9, 0.99))
    trained, optimiser = run.prepare(trained, optimiser)
    ema = Ema(trained, section.ema)
    run.resume(model=trained, optimiser=optimiser, ema=ema)

    for step in run.steps(section.steps):
        with run.timer("data"):
            # Every process draws for the whole batch and takes its share: any number of them learns the same.
            rng = np.random.default_rng([section.seed, step])
            torch.manual_seed(step_seed(section.seed, step))
            chosen = rng.choice(rows, section.batch, replace=False)
            asked = [asked_of(histories, extracted.owners[row], rng, args) for row in chosen]
            vector = drop_parts(vectors[chosen], widths, section.drop_part, section.drop_user)
            dropped = vector.abs().sum(1) == 0
            timesteps = torch.randint(0, len(base.schedule), (section.batch,))
            noise = torch.randn(section.batch, *latents.shape)
            # No text means no oracle text either: those rows learn from pictures alone.
            teachable = torch.tensor([bool(w.prompt and w.enriched) for w in asked])
            # The teachable rows of the batch have the oracle's weight together, however it is cut.
            taught = teachable * (section.batch / max(1, int(teachable.sum())))

            share = section.batch // run.world_size
            mine = slice(run.rank * share, (run.rank + 1) * share)
            asked, dropped, teachable = asked[mine], dropped[mine], teachable[mine]
            vector, timesteps, noise, taught = (t[mine].to(device) for t in (vector, timesteps, noise, taught))
            clean, sizes = latents.of([w.picture for w in asked])
            neutral = [w.prompt for w in asked]
            oracle = [w.prompt if d or not t else w.enriched for w, d, t in zip(asked, dropped, teachable, strict=True)]
            noisy, target = base.schedule.add_noise(clean.to(device), timesteps, noise)
            student_text, teacher_text = texts(neutral), texts(oracle) if section.distil else None
            weights = base.schedule.min_snr_weights(timesteps, section.min_snr)
        losses = {"picture": 0.0, "distil": 0.0}
        for piece in run.micro_batches(np.arange(share)):
            shape = sizes if sizes is None else sizes[piece]
            inputs = noisy[piece], timesteps[piece]
            if section.distil:
                with run.timer("teacher"), torch.no_grad():
                    connect(branch, None)
                    teacher = base.predict(*inputs, teacher_text[piece], shape)
            with run.timer("forward"):
                with base.autocast():
                    connect(branch, adapter.keys_values(vector[piece]))
                student = base.predict(*inputs, student_text[piece], shape)
                picture = (squared(student, target[piece]) * weights[piece]).mean()
                loss = picture
                if section.distil:
                    distil = (squared(student, teacher) * weights[piece] * taught[piece]).mean()
                    loss = (1 - section.distil) * picture + section.distil * distil
                    losses["distil"] += distil.detach() / section.accumulate
                losses["picture"] += picture.detach() / section.accumulate
            run.backward(loss)
        norm = run.update(optimiser, cosine(step, section.steps, section.lr, section.warmup))
        ema.update(step)
        run.log(loss=run.loss, **losses, grad_norm=norm)
        if section.pictures_every and (step + 1) % section.pictures_every == 0 and first:
            with averaged(trained, ema):
                run.pictures("users", paint(base, branch, adapter, texts, histories, extracted, vectors))

    trained.load_state_dict(ema.shadow)
    figures = {}
    if first:
        adapter = trained_adapter(args)
        save_adapter(adapter, WEIGHTS / "adapter.safetensors" if wanted is None else run.folder / "adapter.safetensors")
        if wanted is None:
            figures = evaluate(run, adapter, section.users)
        else:
            adapter.to(device)
            chosen = np.unique(np.where(heldout, extracted.owners, -1), return_index=True)[1][1:][: section.users]
            figures = heldout_losses(
                base, branch, adapter, texts, latents, histories, extracted.owners, vectors, chosen
            )
    run.finish(**figures)


def asked_of(histories: World, owner: int, rng: np.random.Generator, args: StageArgs[TrainUserAttention]) -> Target:
    """One request of a user; at times without its text."""
    wanted = histories.target(int(owner), rng)
    return Target(wanted.picture, "", None) if rng.random() < args.section.drop_text else wanted


@full_precision
def squared(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every sample, [B]."""
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)


@contextmanager
def averaged(trained: torch.nn.ModuleDict, ema: Ema) -> Iterator[None]:
    """Inside of it the trained weights are their averages."""
    own = {key: value.clone() for key, value in trained.state_dict().items()}
    trained.load_state_dict(ema.shadow)
    try:
        yield
    finally:
        trained.load_state_dict(own)


@torch.no_grad()
def paint(base, branch, adapter, texts, histories, extracted, vectors) -> torch.Tensor:
    """Pictures [2 * users, 3, H, W] in -1..1: the first users' first requests without and with them. Users, prompts and
    noise are the same every time."""
    _, rows = np.unique(extracted.owners, return_index=True)
    rows = rows[:SHOWN]
    asked = [histories.target(int(extracted.owners[row]), np.random.default_rng(0)) for row in rows]
    count, text, off = len(rows), texts([w.prompt for w in asked]), texts([""])
    states = torch.cat([off.states.expand_as(text.states)] * 2 + [text.states] * 2)  # unconditional half first
    pooled = None if text.pooled is None else torch.cat([off.pooled.expand_as(text.pooled)] * 2 + [text.pooled] * 2)
    condition = Text(states, pooled)
    sizes = torch.tensor([[base.pixels, base.pixels, 0, 0]] * 4 * count)
    with base.autocast():
        pairs = adapter.keys_values(vectors[rows].to(base.device))
    # Values of zero add nothing: only the last quarter, the conditional half with users, has the branch.
    connect(branch, [(torch.cat([k] * 4), torch.cat([torch.zeros_like(v)] * 3 + [v])) for k, v in pairs])
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    noise = seeded_noise((base.unet.config.in_channels, base.pixels // factor, base.pixels // factor), range(count))

    def predict(noisy, timestep):
        return base.predict(noisy, timestep.to(base.device), condition, sizes)

    latents = torch.cat([noise, noise]).to(base.device)
    latents = guided_sample(predict, latents, base.scheduler, SHOWN_STEPS, GUIDANCE)
    return decode(base.vae, latents.to(base.vae.device), batch=2)


@torch.no_grad()
def heldout_losses(base, branch, adapter, texts, latents, histories, owners, vectors, rows) -> dict[str, float]:
    """Denoising loss on pictures that users outside of training like: with the user, with another one, with none. The
    noise is the same in all three. rows: one history of each user."""
    totals = dict.fromkeys(("user", "other_user", "no_user"), 0.0)
    for i, (row, other) in enumerate(zip(rows, np.roll(rows, 1), strict=True)):
        asked = histories.target(int(owners[row]), np.random.default_rng(int(row)))
        clean, sizes = latents.of([asked.picture] * 4)
        torch.manual_seed(i)
        timesteps = ((torch.arange(4) + torch.rand(4)) * len(base.schedule) / 4).long().to(base.device)
        noise = torch.randn(clean.shape).to(base.device)
        noisy, target = base.schedule.add_noise(clean.to(base.device), timesteps, noise)
        text = texts([asked.prompt] * 4)
        for name, vector in zip(totals, (vectors[row], vectors[other], torch.zeros_like(vectors[row])), strict=True):
            with base.autocast():
                connect(branch, adapter.keys_values(vector[None].expand(4, -1).to(base.device)))
            totals[name] += squared(base.predict(noisy, timesteps, text, sizes), target).mean().item()
    return {f"heldout_loss_{name}": total / len(rows) for name, total in totals.items()} | {"users": len(rows)}


def evaluate(run, adapter: UserAdapter, count: int) -> dict[str, float]:
    """Alignment and named subjects on test users and held-out prompts, one picture each; histories drawn by the
    renderer and read by the real encoder."""
    from .evaluation.evaluate.painter import Painter, paint_row, requests
    from .evaluation.evaluate.readings import alignment, read
    from .evaluation.rows import BASIC, ROWS

    painter, people, figures = Painter(adapter), users_of("test", count), {}
    asked = requests(people, 1)
    for name in BASIC:
        pictures = torch.cat(list(paint_row(painter, ROWS[name], people, asked)))
        picture_grid(pictures, run.folder / "samples" / f"{name}.png")
        readings = read(painter, pictures)
        figures[name] = float(alignment(readings, people, asked).mean())
        named = [r["subject"] == subject for r, (_, subject, _) in zip(readings, asked, strict=True)]
        figures[f"{name}_subject"] = float(np.mean(named))
    gain = figures["oracle"] - figures["none"]  # an untrained UNet gains nothing
    return figures | {"gain_share": (figures["prefgen"] - figures["none"]) / gain if gain else None}


if __name__ == "__main__":
    with exit_with_message():
        main()
