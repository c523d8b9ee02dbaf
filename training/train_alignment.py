"""Stage 11: align e_sem with CLIP's text space by MMD.

    python -m training.train_alignment --runs runs/atelier

Target bank: CLIP text embeddings of the training users' liked attributes. Loss: unbiased multi-bandwidth MMD between
a large batch of aligned users and the bank, plus a weak paired cosine term (marginal MMD alone is content with any
permutation of users). Reports retrieval on held-out users beside the MMD, since neither says enough alone.
`--set train_alignment.mmd=0 --set train_alignment.paired=1` leaves the point-wise term alone: the ablation.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.mmd import median_bandwidths, mmd2

from . import core
from .bases import Base, BaseError, load_base
from .config.command import arguments
from .data.errors import DataError
from .extract import Extracted
from .histories import Histories, histories_of


def text_bank(base: Base, world: Histories, users: list[int]) -> torch.Tensor:
    """Unit CLIP text embeddings [users, C] of each user's tastes (the mean of two for a user with two)."""
    texts = [world.texts(user) for user in users]
    if not all(texts):
        raise DataError(
            f"{world.name} doesn't say what user {users[[bool(t) for t in texts].index(False)]} likes in words, which "
            "e_sem is aligned to: take a data set with attributes, or describe the users' tastes first."
        )
    rows, bank, start = base.bank([text for tastes in texts for text in tastes]), [], 0
    for tastes in texts:
        bank.append(F.normalize(rows[start : start + len(tastes)].mean(0), dim=0))
        start += len(tastes)
    return torch.stack(bank)


def main() -> None:
    args = arguments("train_alignment", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    extracted = Extracted(args.runs)
    layers = json.loads((args.runs / "probe_layers" / "layers.json").read_text())
    people, owners = np.unique(extracted.owners, return_inverse=True)
    owners = torch.from_numpy(owners)
    try:
        base, world = load_base(args.config), histories_of(args.config, args.runs)
        bank = text_bank(base, world, people.tolist())
    except (BaseError, DataError) as error:
        raise SystemExit(str(error)) from error
    learnt = len(bank) * 95 // 100  # users; the others are held out
    if min(learnt, len(bank) - learnt) < 2:
        raise SystemExit(f"{len(bank)} users are too few to align and to hold some out: extract 40 or more.")
    heldout = owners >= learnt
    states = extracted.hidden[:, layers["sem_layers"]]
    norm = LayerStandardiser(*states.shape[1:])
    norm.fit(states[~heldout])
    states, target = norm(states), bank[owners]
    train = torch.nonzero(~heldout)[:, 0]
    aligner = SemanticAligner(states.shape[1], states.shape[2], bank.shape[1])
    half = min(1024, learnt // 2)
    bandwidths = median_bandwidths(bank[:half], bank[half : 2 * half])
    optimiser = torch.optim.AdamW(core.parameter_groups(aligner, 0.01))
    run.resume(model=aligner, norm=norm, optimiser=optimiser)
    for step in run.steps(args.steps):
        chosen = train[core.batch_indices(args.seed, step, args.batch, len(train))]
        aligned = F.normalize(aligner(states[chosen]), dim=1)
        reference = bank[torch.randint(0, learnt, (args.bank,))]
        distance = mmd2(aligned, reference, bandwidths)
        paired = 1 - (aligned * target[chosen]).sum(1).mean()
        loss = args.mmd * distance + args.paired * paired
        norm_of_gradient = core.optimise(loss, optimiser, core.cosine(step, args.steps, args.lr, 50))
        run.log(loss=loss, mmd=distance, paired=paired, grad_norm=norm_of_gradient)

    aligner.eval()
    with torch.inference_mode():
        aligned = F.normalize(aligner(states[heldout]), dim=1)
        owners = owners[heldout]
        candidates = torch.unique(owners)
        ranks = (aligned @ bank[candidates].T).argsort(1, descending=True)
        found = candidates[ranks] == owners[:, None]
        figures = {
            "heldout_mmd": mmd2(aligned, bank[candidates], bandwidths).item(),
            "heldout_cosine": (aligned * bank[owners]).sum(1).mean().item(),
            "retrieval_top1": found[:, :1].any(1).float().mean().item(),
            "retrieval_top5": found[:, :5].any(1).float().mean().item(),
            "candidates": len(candidates),
        }
    run.finish(**figures)


if __name__ == "__main__":
    main()
