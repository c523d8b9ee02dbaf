"""Stage 11: align e_sem with CLIP's text space by MMD.

    python -m training.train_alignment --runs runs/atelier

In: H of the extracted histories at the layers of e_sem [n, 4, D], and what their users like in words: attributes, or
what a set without any knows (training/data/targets.py).
Out: the aligner (a small MLP, [4, D] -> [C]) and its standardiser, in the last checkpoint.

The paper (arXiv 2512.06020) aligns e_sem with the CLIP text embeddings of the user's attributes by a maximum mean
discrepancy, since a loss on distributions keeps the diversity that point-wise losses can collapse. Here the MMD is
marginal: between a large batch of aligned users and a bank of training users' texts, which is content with any
permutation of users. A weak paired cosine term says which text is whose (docs/departures.md). The target is likes, and
with `train_alignment.dislikes` a second text beside it, of what is disliked.
Reports retrieval on held-out users beside the MMD, since neither says enough alone.
`--set train_alignment.mmd=0 --set train_alignment.paired=1` leaves the point-wise term alone: the ablation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.aligner import LayerStandardiser, SemanticAligner

from .common.base import Base
from .common.bases import load_base
from .common.chain import made_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import TrainAlignment
from .common.errors import exit_with_message
from .common.mmd import median_bandwidths, mmd2
from .common.optim import cosine, parameter_groups
from .common.order import batch_indices, step_seed
from .common.run import Run
from .common.stage_outputs import ExtractedUsers, chosen_layers, first_heldout
from .data.open_world import open_world
from .data.targets import ATTRIBUTES, disliked_text, target_of, texts_of
from .data.worlds import World

# On either side, for the median distance that the kernel's bandwidths are octaves of.
KERNEL_TEXTS = 1024


def main() -> None:
    args = arguments(TrainAlignment, __doc__)
    section = args.section
    world = open_world(args.config, args.runs)
    extracted = ExtractedUsers(args.runs)
    extracted.check_world(world.name)
    run = Run(args, made_of=made_of(args.config, args.runs, args.stage, world.digest))
    if run.finished:
        return
    data = alignment_data(args, world, extracted, run.accelerator.device)
    # Fitted on the histories that are learnt from: the others show what an unseen user meets.
    norm = LayerStandardiser(*data.states.shape[1:])
    norm.fit(data.states[data.train])
    norm.to(run.accelerator.device)
    aligner = SemanticAligner(*data.states.shape[1:], data.bank.shape[1], section.hidden)
    texts = data.train_texts
    bandwidths = median_bandwidths(texts[:KERNEL_TEXTS], texts[KERNEL_TEXTS : 2 * KERNEL_TEXTS])
    optimiser = torch.optim.AdamW(parameter_groups(aligner, 0.01))
    aligner, optimiser = run.prepare(aligner, optimiser)
    run.resume(model=aligner, norm=norm, optimiser=optimiser)

    for step in run.steps(section.steps):
        with run.timer("data"):
            rows = batch_indices(section.seed, step, section.batch, len(data.train), run.rank, run.world_size)
            chosen = data.train[rows]
            standard = norm(data.states[chosen].to(run.accelerator.device))
            target = data.text_of(chosen, torch.Generator().manual_seed(step_seed(section.seed, step, run.rank + 1)))
            # Every process compares with the same texts.
            shared = torch.Generator().manual_seed(step_seed(section.seed, step))
            reference = texts[torch.randint(0, len(texts), (section.bank,), generator=shared)]
        with run.timer("forward"):
            aligned = F.normalize(aligner(standard), dim=1)  # [B, C]
            # Between sets: with several processes the set is the whole batch, not a share of it.
            distance = mmd2(run.gather_rows(aligned), reference, bandwidths)
            paired = 1 - (aligned * target).sum(1).mean()
            loss = section.mmd * distance + section.paired * paired
        grad_norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, section.warmup))
        run.log(loss=run.loss, mmd=distance, paired=paired, grad_norm=grad_norm)
        if section.heldout_every and (step + 1) % section.heldout_every == 0 and run.rank == 0:
            run.log_figures(**evaluate(data, norm, aligner, bandwidths))

    run.finish(target=data.target, **evaluate(data, norm, aligner.eval(), bandwidths))


@dataclass
class AlignmentData:
    """The histories of users whose taste is known in words.

    states [n, layers, D]: e_sem of every extracted history; owners [n]: its user. bank [texts, C]: unit text embeddings
    on the device, train_texts those that the training histories' users have; first, counts [users]: where each user's
    texts stand in the bank, one a user or one a taste. train, heldout: histories to learn from and to measure on, of
    different users. target: what says the tastes.
    """

    states: torch.Tensor
    owners: torch.Tensor
    bank: torch.Tensor
    first: torch.Tensor
    counts: torch.Tensor
    train_texts: torch.Tensor
    train: torch.Tensor
    heldout: torch.Tensor
    target: str

    def text_of(self, histories: torch.Tensor, draw: torch.Generator | None = None) -> torch.Tensor:
        """What each history's user likes, [B, C]: of several texts one that is drawn, or the first."""
        owners = self.owners[histories]
        rows = self.first[owners]
        if draw is not None:
            rows = rows + (torch.rand(len(rows), generator=draw) * self.counts[owners]).long()
        return self.bank[rows.to(self.bank.device)]

    @property
    def bank_owners(self) -> torch.Tensor:
        """The user of every row of the bank, [texts]."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)


def alignment_data(
    args: StageArgs[TrainAlignment], world: World, extracted: ExtractedUsers, device: torch.device
) -> AlignmentData:
    """Histories and texts of the extracted users. SystemExit where too few users have a taste in words."""
    layers = chosen_layers(args.runs, extracted.hidden.shape[1])["sem_layers"]
    users, user_rows = np.unique(extracted.owners, return_inverse=True)
    target = target_of(world, args.section.target)
    if target != ATTRIBUTES:
        print(f"train_alignment: no attributes are known; the target is made of {target}.", flush=True)
    base = load_base(args.config, device, without=("unet", "vae"))
    if args.section.tastes == "drawn":
        bank, counts = taste_bank(base, world, users.tolist(), target)
    else:
        bank = user_bank(base, world, users.tolist(), target)
        counts = torch.ones(len(users), dtype=torch.int64)
    first = counts.cumsum(0) - counts
    has_words = bank[first].abs().sum(1).cpu() > 0  # [users]
    if args.section.dislikes:
        bank = with_dislikes(base, world, users.tolist(), target, bank, counts)
    bank = bank.to(device)
    border = first_heldout(len(users))
    if has_words[:border].sum() < 2 or has_words[border:].sum() < 2:
        raise SystemExit(
            f"train_alignment: of {len(users)} users of {world.name} only {int(has_words.sum())} have a taste in "
            f"words ({target}), which e_sem is aligned with: take more users, have an MLLM tell their traits "
            "(training.data.traits), or leave e_sem out by train_user_attention.parts=[core,image]."
        )
    owners = torch.from_numpy(user_rows)
    return AlignmentData(
        states=torch.as_tensor(np.asarray(extracted.hidden[:, layers])),
        owners=owners,
        bank=bank,
        first=first,
        counts=counts,
        train_texts=bank[(has_words & (torch.arange(len(users)) < border)).repeat_interleave(counts).to(device)],
        train=torch.nonzero((owners < border) & has_words[owners])[:, 0],
        heldout=torch.nonzero((owners >= border) & has_words[owners])[:, 0],
        target=target,
    )


def user_bank(base: Base, world: World, users: list[int], target: str = ATTRIBUTES) -> torch.Tensor:
    """Unit text embeddings [users, C] of what each user likes, as `targets.texts_of` says it: the weighted mean of
    several texts, zeros for a user whose taste nobody knows in words."""
    texts = [texts_of(world, target, user) for user in users]
    different = sorted({text for own in texts for text, _ in own})
    if not different:
        return torch.zeros(len(users), 1)
    embeddings = base.text_bank(different)  # [texts, C]
    places = {text: i for i, text in enumerate(different)}
    bank = torch.zeros(len(users), embeddings.shape[1])
    for row, own in zip(bank, texts, strict=True):
        if own:
            weights = torch.tensor([weight for _, weight in own])
            row.copy_(F.normalize(weights @ embeddings[[places[text] for text, _ in own]], dim=0))
    return bank


def taste_bank(base: Base, world: World, users: list[int], target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(unit text embeddings [texts, C] of each taste by itself, texts a user [users]). Where a world's attributes don't
    say the tastes there is one text a user."""
    if target != ATTRIBUTES:
        return user_bank(base, world, users, target), torch.ones(len(users), dtype=torch.int64)
    texts = [world.texts(user) or [""] for user in users]
    bank = base.text_bank([text for own in texts for text in own])
    empty = torch.tensor([not text for own in texts for text in own])
    bank[empty] = 0
    return bank, torch.tensor([len(own) for own in texts])


def with_dislikes(
    base: Base, world: World, users: list[int], target: str, bank: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """The bank [texts, C] with what each row's user dislikes beside it: unit rows [texts, 2 C]. A user who dislikes
    nothing that words can say has the embedding of the empty prompt there."""
    texts = [disliked_text(world, target, user) for user in users]
    different = sorted(set(texts))
    rows = torch.tensor([different.index(text) for text in texts])
    disliked = base.text_bank(different)[rows].repeat_interleave(counts, 0)
    return torch.cat([bank, disliked], 1) / 2**0.5


@torch.inference_mode()
def evaluate(data: AlignmentData, norm: LayerStandardiser, aligner, bandwidths: torch.Tensor) -> dict[str, float]:
    """Of histories of held-out users: is the own text the nearest of all held-out users', and how far are both sets
    apart. As many histories of seen users beside them, evenly drawn, show what is only remembered."""

    def aligned(histories: torch.Tensor) -> torch.Tensor:
        return F.normalize(aligner(norm(data.states[histories].to(data.bank.device))), dim=1)

    # An aligner of 4,000 users knew them by heart: cosine 0.90 to the texts of those, 0.78 to others'. A branch trained
    # on such an e_sem meets a worse one in use (docs/evidence/notes.md).
    seen = data.train[:: max(1, len(data.train) // len(data.heldout))]
    heldout = aligned(data.heldout)
    device = data.bank.device
    owners = data.owners[data.heldout].to(device)
    candidates = torch.unique(owners)
    among = torch.isin(data.bank_owners.to(device), candidates)
    bank = data.bank[among]
    ranks = (heldout @ bank.T).argsort(1, descending=True)
    hits = data.bank_owners.to(device)[among][ranks] == owners[:, None]
    return {
        "heldout_mmd": mmd2(heldout, bank, bandwidths).item(),
        "heldout_cosine": (heldout * data.text_of(data.heldout)).sum(1).mean().item(),
        "seen_cosine": (aligned(seen) * data.text_of(seen)).sum(1).mean().item(),
        "retrieval_top1": hits[:, :1].any(1).float().mean().item(),
        "retrieval_top5": hits[:, :5].any(1).float().mean().item(),
        "candidates": len(candidates),
    }


if __name__ == "__main__":
    with exit_with_message():
        main()
