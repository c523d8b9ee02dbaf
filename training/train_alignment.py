"""Stage 11: align e_sem with CLIP's text space by MMD.

    python -m training.train_alignment --runs runs/atelier

Target bank: CLIP text embeddings of the training users' liked attributes. Loss: unbiased multi-bandwidth MMD between
a large batch of aligned users and the bank, plus a weak paired cosine term (marginal MMD alone is content with any
permutation of users). Reports retrieval on held-out users beside the MMD, since neither says enough alone.
`--set train_alignment.mmd=0 --set train_alignment.paired=1` leaves the point-wise term alone: the ablation.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.atelier.models import clip_tokenizer, load_clip
from prefgen.atelier.users import User
from prefgen.mmd import median_bandwidths, mmd2

from . import core
from .atelier.clip import text_features, tokenize
from .config.command import arguments
from .extract import Extracted
from .train_mllm import PHRASES
from .users_pool import users_of


def taste_text(person: User, taste: int = 0) -> str:
    """One taste in the words of a prompt: "pastel palette, thick outline, ..."."""
    return ", ".join(PHRASES[tuple(pair)] for pair in person.tastes[taste].liked)


@torch.inference_mode()
def text_bank(people: list[User]) -> torch.Tensor:
    """Unit CLIP text embeddings [users, C] of each user's tastes (the mean of two for a user with two)."""
    clip, tokenizer = load_clip(), clip_tokenizer()
    texts = [taste_text(p, t) for p in people for t in range(len(p.tastes))]
    rows = torch.cat(
        [text_features(clip, tokenize(tokenizer, texts[i : i + 256]))[1] for i in range(0, len(texts), 256)]
    )
    rows, bank, start = F.normalize(rows, dim=1), [], 0
    for person in people:
        bank.append(F.normalize(rows[start : start + len(person.tastes)].mean(0), dim=0))
        start += len(person.tastes)
    return torch.stack(bank)


def main() -> None:
    args = arguments("train_alignment", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    users = Extracted(args.runs)
    layers = json.loads((args.runs / "probe_layers" / "layers.json").read_text())
    bank = text_bank(users_of("train", int(users.owners.max()) + 1))
    heldout = torch.from_numpy(users.owners >= len(bank) * 95 // 100)
    states = users.hidden[:, layers["sem_layers"]]
    norm = LayerStandardiser(*states.shape[1:])
    norm.fit(states[~heldout])
    states, target = norm(states), bank[users.owners]
    train = torch.nonzero(~heldout)[:, 0]
    aligner = SemanticAligner(states.shape[1], states.shape[2], bank.shape[1])
    bandwidths = median_bandwidths(bank[:1024], bank[1024:2048])
    optimiser = torch.optim.AdamW(core.parameter_groups(aligner, 0.01))
    run.resume(model=aligner, norm=norm, optimiser=optimiser)
    for step in run.steps(args.steps):
        chosen = train[core.batch_indices(args.seed, step, args.batch, len(train))]
        aligned = F.normalize(aligner(states[chosen]), dim=1)
        reference = bank[torch.randint(0, len(bank) * 95 // 100, (2048,))]
        distance = mmd2(aligned, reference, bandwidths)
        paired = 1 - (aligned * target[chosen]).sum(1).mean()
        loss = args.mmd * distance + args.paired * paired
        norm_of_gradient = core.optimise(loss, optimiser, core.cosine(step, args.steps, args.lr, 50))
        run.log(loss=loss, mmd=distance, paired=paired, grad_norm=norm_of_gradient)

    aligner.eval()
    with torch.inference_mode():
        aligned = F.normalize(aligner(states[heldout]), dim=1)
        owners = torch.from_numpy(users.owners)[heldout]
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
