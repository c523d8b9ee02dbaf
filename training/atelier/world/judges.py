"""What the two judges' stages share: their losses, their augmentations, and how well they read fresh renders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prefgen.atelier.models import WEIGHTS
from prefgen.atelier.world.judge import PERIODIC, Judge, distances, shares_of
from prefgen.atelier.world.labels import CLASSES, class_labels, value_labels, visible_traits
from prefgen.atelier.world.models import as_read
from prefgen.atelier.world.prompts import Prompt
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import random_scene
from prefgen.atelier.world.subjects import CLASS_OF
from prefgen.atelier.world.traits import CONTINUOUS

from ...common.config.command import StageArgs
from ...common.config.world import WorldJudge
from ...common.files import save_weights
from ...common.optim import cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.world_pool import WorldPool, as_tensor

HELDOUT_SEED = 900_001
SUBJECT, SETTING = (list(CLASSES).index(name) for name in ("subject", "setting"))
# The variance of a share that is uniform in 0..1: what guessing the middle costs. On a circle, an arc of one share is 2
# pi long, and guessing its centre costs a radius.
UNIFORM = 1 / 12
GUESS = torch.where(PERIODIC, 1 / (2 * torch.pi) ** 2, UNIFORM)
# Of beta-NLL (arXiv 2203.09168). With 0, the plain likelihood, a trait that is read well outweighs one that isn't a
# hundredfold: after 5,000 steps the judge knew sizes to 2 % and nothing of wobble or roundness.
BETA = 0.5
Augmentation = Callable[[torch.Tensor], torch.Tensor]
Through = Callable[[torch.Tensor], torch.Tensor]


def train_judge(args: StageArgs[WorldJudge], name: str, augment: Augmentation) -> None:
    """One judge, from nothing to `name`.safetensors with its figures on fresh renders."""
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    judge = Judge(section.width)
    paired = paired_subjects()
    optimiser = optimiser_of(section.optimiser, judge, 0.02)
    run.resume(model=judge, optimiser=optimiser)

    for step in run.steps(section.steps):
        # Sorted, so that the mapped file is read forwards.
        chosen = np.sort(batch_indices(section.seed, step, section.batch, len(pool)))
        with run.timer("data"):
            pictures = augment(pool.batch(chosen) * 0.5 + 0.5)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            logits, values, log_variances = judge(pictures)
        truth = pool.classes[chosen]
        # What training never shows together is no wrong answer: otherwise the judge would learn that a held-out pair of
        # subject and setting can't be.
        subjects, settings = truth[:, SUBJECT], truth[:, SETTING]
        logits["subject"] = logits["subject"].float().masked_fill(~paired[settings], -1e4)
        logits["setting"] = logits["setting"].float().masked_fill(~paired[:, subjects].T, -1e4)
        losses = [F.cross_entropy(logits[head].float(), truth[:, i]) for i, head in enumerate(CLASSES)]
        reading = value_loss(values, log_variances, pool.values[chosen], pool.seen[chosen])
        loss = torch.stack(losses).sum() + reading
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr))
        accuracy = [(logits[head].argmax(1) == truth[:, i]).float().mean() for i, head in enumerate(CLASSES)]
        run.log(loss=loss, reading=reading, accuracy=torch.stack(accuracy).mean(), worst=min(accuracy), grad_norm=norm)

    judge.eval()
    save_weights(judge.state_dict(), WEIGHTS / f"{name}.safetensors")
    run.finish(**figures(judge, section.heldout))


def paired_subjects() -> torch.Tensor:
    """Which subjects training shows in each setting, bool [settings, subjects]."""
    rows = [
        [not Prompt(CLASS_OF[subject], subject, "one", setting, "none").heldout for subject in CLASSES["subject"]]
        for setting in CLASSES["setting"]
    ]
    return torch.tensor(rows)


def value_loss(
    values: torch.Tensor, log_variances: torch.Tensor, truth: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Gaussian negative log likelihood, the mean over the pictures that show a trait, summed over traits, each weighted
    by a power of its variance: the mean of a trait is pulled as hard whether it is read well or not at all, and the
    variance is still the mean square error. values [B, 13, 2], log_variances, truth and seen [B, 13]."""
    angles = truth * 2 * torch.pi
    # The distance on the unit circle, in shares.
    circle = (values - torch.stack([angles.cos(), angles.sin()], -1)).square().sum(-1) / (2 * torch.pi) ** 2
    squares = torch.where(PERIODIC, circle, (values[..., 0] - truth).square())
    weights = (log_variances.detach().exp() / GUESS) ** BETA
    losses = 0.5 * (squares * (-log_variances).exp() + log_variances) * weights * seen
    # A mean over the pictures that show the trait, not over the batch: hatching is in a quarter of them.
    return (losses.sum(0) / seen.sum(0).clamp(min=1)).sum()


def soften(pictures: torch.Tensor, strength: float, share: float) -> torch.Tensor:
    """Blur a share of the pictures a little: a decoder's are less crisp than renders."""
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    chosen = torch.rand(len(pictures), 1, 1, 1) < share
    return pictures + (soft - pictures) * (torch.rand(len(pictures), 1, 1, 1) * strength * chosen)


def shade(pictures: torch.Tensor, gain: float, noise: float) -> torch.Tensor:
    """Other gains a channel, and noise. Both are small: colours and their saturation are traits."""
    gains = 1 + (torch.rand(len(pictures), 3, 1, 1) - 0.5) * gain
    noises = torch.randn_like(pictures) * (torch.rand(len(pictures), 1, 1, 1) * noise)
    return (pictures * gains + noises).clamp(0, 1)


@torch.inference_mode()
def figures(judge: Judge, count: int, through: Through | None = None) -> dict:
    """Accuracy of every head and R2 of every trait on `count` fresh renders, and how much 90 % intervals cover, scaled
    by what covers 90 % of as many other renders (split conformal prediction, arXiv 2107.07511).

    through: what the renders [B, 3, 256, 256] in -1..1 pass before they are read, such as a VAE there and back.
    """
    fresh = _read_fresh(judge, 0, count, through)
    others = _read_fresh(judge, count, count, through)
    right = fresh["classes"] == fresh["true_classes"]
    unpaired = ~paired_subjects()[fresh["true_classes"][:, SETTING], fresh["true_classes"][:, SUBJECT]]
    covered = {}
    explained = {}
    for i, name in enumerate(CONTINUOUS):
        seen = fresh["seen"][:, i]
        error = distances(fresh["shares"], fresh["values"])[seen, i]
        # Whatever is guessed on a circle, the distance is uniform in 0..1/2, of mean square 1/12.
        spread = UNIFORM if PERIODIC[i] else fresh["values"][seen, i].var(unbiased=False).item()
        explained[name] = round(1 - error.square().mean().item() / spread, 4)
        elsewhere = others["seen"][:, i]
        ratios = (distances(others["shares"], others["values"]) / others["errors"])[elsewhere, i]
        within = error <= ratios.quantile(0.9) * fresh["errors"][seen, i]
        covered[name] = round(within.float().mean().item(), 3)
    accuracy = {name: round(right[:, i].float().mean().item(), 4) for i, name in enumerate(CLASSES)}
    accuracy["subject of a held-out pair"] = round(right[unpaired, SUBJECT].float().mean().item(), 4)
    return {"accuracy": accuracy, "r2": explained, "covered": covered, "renders": count}


def _read_fresh(judge: Judge, first: int, count: int, through: Through | None) -> dict[str, torch.Tensor]:
    """What a judge reads off fresh renders, and what is true, by name: [count, ...]."""
    rows: dict[str, list] = {name: [] for name in ("classes", "true_classes", "shares", "values", "errors", "seen")}
    for start in tqdm(range(first, first + count, 64), desc="fresh renders", mininterval=5):
        stop = min(start + 64, first + count)
        scenes = [random_scene(np.random.default_rng([HELDOUT_SEED, i])) for i in range(start, stop)]
        pictures = as_tensor(np.stack([render(scene) for scene in scenes]))
        pictures = through(pictures) if through else pictures
        logits, values, log_variances = judge(as_read(pictures) * 0.5 + 0.5)
        rows["classes"].append(torch.stack([logits[name].argmax(1) for name in CLASSES], 1))
        rows["true_classes"].append(torch.tensor([class_labels(scene) for scene in scenes]))
        rows["shares"].append(shares_of(values))
        rows["values"].append(torch.tensor([value_labels(scene) for scene in scenes]))
        rows["errors"].append((0.5 * log_variances).exp())
        rows["seen"].append(torch.tensor([visible_traits(scene) for scene in scenes]))
    return {name: torch.cat(parts) for name, parts in rows.items()}
