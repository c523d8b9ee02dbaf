"""Stage 12: train the user cross-attention branch and the projection of the user vector.

    python -m training.train_user_attention --runs runs/atelier
    accelerate launch -m training.train_user_attention --config sdxl_8x80gb

In: what `extract` read of every history (H [n, layers, D], e_img [n, I]), the layers of `probe_layers`, the aligner of
`train_alignment`, and a picture that the history's user likes with its prompt. Out: `adapter.safetensors`, whose
projection makes user tokens [N, X] of a user vector [C + D + I], and whose K and V read them in every cross-attention.

The paper (arXiv 2512.06020) fuses e_u = [e_sem aligned ; e_core ; e_img] and injects it by a parallel user
cross-attention in the frozen diffusion UNet, as IP-Adapter does with an image (arXiv 2308.06721). Here K and V of the
branch start from the UNet's own, or from a public IP-Adapter's. The student sees the neutral prompt and the user; two
targets share the weight:
- the noise of a picture that this user likes, the paper's diffusion loss;
- the frozen UNet's own prediction when it is told what the user likes: in the prompt's words, or in the atelier's
  second edition by trait tokens (training/data/lessons.py), and pushed away from what the user dislikes. That teacher
  is ours and not the paper's (docs/departures.md): it is less noisy than any picture and shortens training many times,
  but what it teaches is what words, or those tokens, can do. `--set train_user_attention.distil=0` leaves it out.

The user vector's parts, the whole user and the text are dropped at times, so that the artist's weights and guidance
work; a dropped user must predict what the plain UNet predicts. With `--set train_user_attention.parts=[image]` it is an
image-only adapter: the same branch on the CLIP embedding alone, without an MLLM and the stages that train it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.adapter import UserAdapter
from prefgen.adapter_file import save_adapter
from prefgen.atelier.models import WEIGHTS

from .common.adapters import new_adapter, trained_adapter, trained_parts
from .common.base import Base, Text
from .common.bases import load_base, load_unet
from .common.chain import made_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import TrainUserAttention
from .common.errors import exit_with_message
from .common.files import picture_grid
from .common.optim import Ema, cosine, optimiser_of
from .common.precision import full_precision
from .common.run import Run
from .common.sampling import decode, guided_sample, seeded_noise
from .common.stage_outputs import ExtractedUsers
from .common.user_branch import Branch, connect, install
from .data.atelier_users import users_of
from .data.branch_data import TrainingData, caches, training_data
from .data.lessons import answer_of
from .data.open_world import open_world, painted_smaller
from .evaluation.evaluate.painter import Painter, paint_row, requests
from .evaluation.evaluate.readings import alignment, read
from .evaluation.rows import BASIC, ROWS

# The grids of samples.
SHOWN_USERS = 4
SAMPLING_STEPS = 20
# Of every held-out user's picture, spread over the schedule.
HELDOUT_TIMESTEPS = 4


def main() -> None:
    args = arguments(TrainUserAttention, __doc__)
    section = args.section
    world = open_world(args.config, args.runs)
    extracted = ExtractedUsers(args.runs)
    extracted.check_world(world.name)
    run = Run(args, made_of=made_of(args.config, args.runs, args.stage, world.digest))
    if run.finished:
        return
    check(args, run)
    base = load_base(args.config, run.accelerator.device, without=("unet",))
    # Before the UNet is there: what they need is free.
    shelves, texts = caches(args, run, world, extracted, base)
    base.take_unet(load_unet(args.config))
    adapter = new_adapter(args, base)
    # Tiny UNets on a CPU are slower with torch's fused kernels.
    branch = install(base.unet, fused=base.family != "atelier")
    if args.config.base.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    data = training_data(args, run, world, extracted, base, adapter, shelves, texts)
    trained = trained_parts(adapter)
    optimiser = optimiser_of(section.optimiser, trained, 0.01)
    trained, optimiser = run.prepare(trained, optimiser)
    ema = Ema(trained, section.ema)
    run.resume(model=trained, optimiser=optimiser, ema=ema)

    for step in run.steps(section.steps):
        with run.timer("data"):
            batch = data.batch(step, run.rank, run.world_size)
        losses = {"picture": 0.0, "distil": 0.0}
        for rows in run.micro_batches(np.arange(len(batch.vectors))):
            part = batch.of(rows)
            # The plain UNet is told the taste, the student has to see it in the user vector alone.
            if data.distil:
                with run.timer("teacher"), torch.no_grad():
                    connect(branch, None)
                    teacher = answer_of(base, part)
            with run.timer("forward"):
                with base.autocast():
                    connect(branch, adapter.keys_values(part.vectors))
                student = base.predict(part.noisy, part.timesteps, part.text, part.sizes)
                picture = (squared_error(student, part.target) * part.weights).mean()
                loss = picture
                if data.distil:
                    distil = (squared_error(student, teacher) * part.weights * part.teacher_weights).mean()
                    loss = (1 - data.distil) * picture + data.distil * distil
                    losses["distil"] += distil.detach() / section.accumulate
                losses["picture"] += picture.detach() / section.accumulate
            run.backward(loss)
        norm = run.update(optimiser, cosine(step, section.steps, section.lr, section.warmup))
        ema.update(step)
        run.log(loss=run.loss, **losses, grad_norm=norm)
        if run.rank == 0 and is_due(section, step):
            # What is exported is looked at: the averages.
            with averaged(trained, ema):
                look(section, run, data, base, branch, adapter)

    trained.load_state_dict(ema.shadow)
    figures = export_and_measure(args, run, data, base, branch) if run.rank == 0 else {}
    run.finish(**figures)


def check(args: StageArgs[TrainUserAttention], run: Run) -> None:
    """SystemExit, before anything large is loaded, for what can't be trained together."""
    config = args.config
    if config.data.path is not None and (fault := painted_smaller(config.data.path, config.base.pixels)):
        raise SystemExit(f"{args.stage}: {fault}")
    if config.base.precision == "fp16" and run.accelerator.scaler is None:
        raise SystemExit(
            "base.precision fp16: gradients underflow without a loss scaler; take bf16, or start with `accelerate "
            "launch --mixed_precision fp16`."
        )


@full_precision
def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
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


def is_due(section: TrainUserAttention, step: int) -> bool:
    """Whether something is looked at after this step."""
    return any(every and (step + 1) % every == 0 for every in (section.heldout_every, section.pictures_every))


def look(section: TrainUserAttention, run: Run, data: TrainingData, base: Base, branch, adapter: UserAdapter) -> None:
    """Losses on held-out users and a grid of samples, where they are due after this step."""
    done = run.step + 1
    if section.heldout_every and done % section.heldout_every == 0 and len(data.heldout):
        with run.timer("heldout"):
            run.log_figures(**heldout_losses(data, base, branch, adapter))
    if section.pictures_every and done % section.pictures_every == 0:
        with run.timer("pictures"):
            run.pictures("users", paint(data, base, branch, adapter))


@torch.no_grad()
def paint(data: TrainingData, base: Base, branch: Branch, adapter: UserAdapter) -> torch.Tensor:
    """Pictures [2 * users, 3, H, W] in -1..1: the first users' first targets without and with them. Users, prompts and
    noise are the same every time."""
    _, rows = np.unique(data.owners, return_index=True)
    rows = rows[:SHOWN_USERS]
    targets = [data.world.target(int(data.owners[row]), np.random.default_rng(0)) for row in rows]
    count = len(rows)
    text = data.texts([target.prompt for target in targets])
    empty = data.texts([""])
    # Four quarters: unconditional without and with users, then conditional without and with them.
    states = torch.cat([empty.states.expand_as(text.states)] * 2 + [text.states] * 2)
    pooled = None
    if text.pooled is not None:
        pooled = torch.cat([empty.pooled.expand_as(text.pooled)] * 2 + [text.pooled] * 2)
    condition = Text(states, pooled)
    sizes = torch.tensor([[base.pixels, base.pixels, 0, 0]] * 4 * count)
    with base.autocast():
        pairs = adapter.keys_values(data.vectors[rows].to(base.device))
    # Values of zero add nothing: only the last quarter has the branch.
    connect(branch, [(torch.cat([k] * 4), torch.cat([torch.zeros_like(v)] * 3 + [v])) for k, v in pairs])
    factor = 2 ** (len(base.vae.config.block_out_channels) - 1)
    noise = seeded_noise((base.latent_channels, base.pixels // factor, base.pixels // factor), range(count))
    latents = torch.cat([noise, noise]).to(base.device)

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return base.predict(noisy, timestep.to(base.device), condition, sizes)

    latents = guided_sample(predict, latents, base.scheduler, SAMPLING_STEPS, base.guidance)
    return decode(base.vae, latents.to(base.vae.device), batch=2)


def export_and_measure(
    args: StageArgs[TrainUserAttention], run: Run, data: TrainingData, base: Base, branch: Branch
) -> dict:
    """Write the adapter of the last checkpoint, and measure it on users outside of training."""
    adapter = trained_adapter(args)
    embedded = args.config.base.family == "atelier"
    save_adapter(adapter, (WEIGHTS if embedded else run.folder) / "adapter.safetensors")
    if args.config.data.path is None:
        return measure_atelier(run, adapter, args.section.users)
    if not len(data.heldout):
        return {"users": 0}
    return heldout_losses(data, base, branch, adapter.to(base.device))


@torch.no_grad()
def heldout_losses(data: TrainingData, base: Base, branch: Branch, adapter: UserAdapter) -> dict:
    """Denoising loss on pictures that users outside of training like: with the user, with another one, with none. The
    noise is the same in all three."""
    totals = dict.fromkeys(("user", "other_user", "no_user"), 0.0)
    others = np.roll(data.heldout, 1)
    for i, (row, other) in enumerate(zip(data.heldout, others, strict=True)):
        target = data.world.target(int(data.owners[row]), np.random.default_rng(int(row)))
        clean, sizes = data.latents([target.picture] * HELDOUT_TIMESTEPS)
        torch.manual_seed(i)
        places = torch.arange(HELDOUT_TIMESTEPS) + torch.rand(HELDOUT_TIMESTEPS)
        timesteps = (places * len(base.schedule) / HELDOUT_TIMESTEPS).long().to(base.device)
        noise = torch.randn(clean.shape).to(base.device)
        noisy, prediction = base.schedule.add_noise(clean.to(base.device), noise, timesteps)
        text = data.texts([target.prompt] * HELDOUT_TIMESTEPS)
        own = data.vectors[row]
        for name, vector in zip(totals, (own, data.vectors[other], torch.zeros_like(own)), strict=True):
            with base.autocast():
                vectors = vector[None].expand(HELDOUT_TIMESTEPS, -1).to(base.device)
                connect(branch, adapter.keys_values(vectors))
            student = base.predict(noisy, timesteps, text, sizes)
            totals[name] += squared_error(student, prediction).mean().item()
    users = len(data.heldout)
    return {f"heldout_loss_{name}": total / users for name, total in totals.items()} | {"users": users}


def measure_atelier(run: Run, adapter: UserAdapter, count: int) -> dict[str, float | None]:
    """Alignment and named subjects on test users and held-out prompts, one picture each; histories drawn by the
    renderer and read by the real encoder."""
    painter = Painter(adapter)
    people = users_of("test", count)
    asked = requests(people, 1)
    figures: dict[str, float | None] = {}
    for name in BASIC:
        pictures = torch.cat(list(paint_row(painter, ROWS[name], people, asked)))
        picture_grid(pictures, run.folder / "samples" / f"{name}.png")
        readings = read(painter, pictures)
        named = [reading["subject"] == request.subject for reading, request in zip(readings, asked, strict=True)]
        figures[name] = float(alignment(readings, people, asked).mean())
        figures[f"{name}_subject"] = float(np.mean(named))
    # An untrained UNet gains nothing.
    gain = figures["oracle"] - figures["none"]
    return figures | {"gain_share": (figures["prefgen"] - figures["none"]) / gain if gain else None}


if __name__ == "__main__":
    with exit_with_message():
        main()
