"""Stage 11: align e_sem with CLIP's text space by MMD.

    python -m training.train_alignment --runs runs/atelier

Target bank: the base's own CLIP text embeddings of the training users' liked attributes. Loss: unbiased multi-bandwidth
MMD between a large batch of aligned users and the bank, plus a weak paired cosine term (marginal MMD alone is content
with any permutation of users). Reports retrieval on held-out users beside the MMD, since neither says enough alone.
`--set train_alignment.mmd=0 --set train_alignment.paired=1` leaves the point-wise term alone: the ablation.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.aligner import LayerStandardiser, SemanticAligner

from .common.bases import Base, load_base
from .common.config.command import arguments
from .common.config.schema import TrainAlignment
from .common.errors import exit_with_message
from .common.mmd import median_bandwidths, mmd2
from .common.optim import cosine, parameter_groups
from .common.order import batch_indices, step_seed
from .common.run import Run
from .common.stage_outputs import ExtractedUsers, chosen_layers, first_heldout
from .data.worlds import World, open_world


def user_bank(base: Base, histories: World, users: list[int]) -> torch.Tensor:
    """Unit text embeddings [users, C] of each user's tastes: the mean of two for a user with two, zeros for a user
    whose taste nobody knows in words."""
    texts = [[text for text in histories.texts(user) if text] for user in users]
    rows = iter(base.text_bank(flat)) if (flat := [text for mine in texts for text in mine]) else iter(())
    bank = []
    for mine in texts:
        embeddings = [next(rows) for _ in mine]
        bank.append(F.normalize(torch.stack(embeddings).mean(0), dim=0) if mine else None)
    width = next((len(row) for row in bank if row is not None), 1)
    return torch.stack([torch.zeros(width) if row is None else row for row in bank])


def main() -> None:
    args = arguments(TrainAlignment, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    histories, extracted = open_world(args.config, args.runs), ExtractedUsers(args.runs)
    extracted.check_world(histories.name)
    layers = chosen_layers(args.runs, extracted.hidden.shape[1])["sem_layers"]
    device = run.accelerator.device
    users, owners = np.unique(extracted.owners, return_inverse=True)  # owners [n]: rows of users
    bank = user_bank(load_base(args.config, device, text_only=True), histories, users.tolist()).to(device)
    known = bank.abs().sum(1).cpu() > 0  # [users]
    border = first_heldout(len(users))
    if known[:border].sum() < 2 or known[border:].sum() < 2:
        raise SystemExit(
            f"train_alignment: of {len(users)} users of {histories.name} only {int(known.sum())} have a taste in "
            "words, which e_sem is aligned with: take a data set with attributes, or more users."
        )
    owners = torch.from_numpy(owners)
    train = torch.nonzero((owners < border) & known[owners])[:, 0]
    heldout = torch.nonzero((owners >= border) & known[owners])[:, 0]
    texts = torch.nonzero(known[:border])[:, 0].to(device)
    states = torch.as_tensor(np.asarray(extracted.hidden[:, layers]))  # [n, sem layers, D]
    norm = LayerStandardiser(*states.shape[1:])
    norm.fit(states[train])
    norm.to(device)
    aligner = SemanticAligner(states.shape[1], states.shape[2], bank.shape[1], section.hidden)
    bandwidths = median_bandwidths(bank[texts[:1024]], bank[texts[1024:2048]])
    optimiser = torch.optim.AdamW(parameter_groups(aligner, 0.01))
    aligner, optimiser = run.prepare(aligner, optimiser)
    run.resume(model=aligner, norm=norm, optimiser=optimiser)
    for step in run.steps(section.steps):
        with run.timer("data"):
            chosen = train[batch_indices(section.seed, step, section.batch, len(train), run.rank, run.world_size)]
            standard, target = norm(states[chosen].to(device)), bank[owners[chosen].to(device)]
            # Every process compares with the same texts.
            shared = torch.Generator().manual_seed(step_seed(section.seed, step))
            reference = bank[texts[torch.randint(0, len(texts), (section.bank,), generator=shared)]]
        with run.timer("forward"):
            aligned = F.normalize(aligner(standard), dim=1)  # [B, C]
            distance = mmd2(run.gather_rows(aligned), reference, bandwidths)
            paired = 1 - (aligned * target).sum(1).mean()
            loss = section.mmd * distance + section.paired * paired
        norm_of_gradient = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, section.warmup))
        run.log(loss=run.loss, mmd=distance, paired=paired, grad_norm=norm_of_gradient)

    aligner.eval()

    def read(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(aligner(norm(states[rows].to(device))), dim=1)

    with torch.inference_mode():
        seen = train[:: max(1, len(train) // len(heldout))]
        aligned = read(heldout)
        mine = owners[heldout].to(device)
        candidates = torch.unique(mine)
        ranks = (aligned @ bank[candidates].T).argsort(1, descending=True)
        found = candidates[ranks] == mine[:, None]
        figures = {
            "heldout_mmd": mmd2(aligned, bank[candidates], bandwidths).item(),
            "heldout_cosine": (aligned * bank[mine]).sum(1).mean().item(),
            "seen_cosine": (read(seen) * bank[owners[seen].to(device)]).sum(1).mean().item(),
            "retrieval_top1": found[:, :1].any(1).float().mean().item(),
            "retrieval_top5": found[:, :5].any(1).float().mean().item(),
            "candidates": len(candidates),
        }
    run.finish(**figures)


if __name__ == "__main__":
    with exit_with_message():
        main()
