"""Stage 10: which layers know the user.

    python -m training.probe_layers --runs runs/atelier

For every decoder layer: inter-user discrimination (is another history of the same user the nearest, among users that
no probe was fitted on) and how well a ridge probe names the liked attributes, each beside a control with shuffled
labels. Writes `layers.json` (the top four for e_sem; for e_core the best inter-user layer of the middle-to-upper
ones) and `layers.png`.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from . import core
from .config.command import arguments
from .extract import Extracted
from .histories import histories_of


def retrieval(states: torch.Tensor, owners: torch.Tensor) -> float:
    """Share of histories [n, D] whose nearest other history (cosine of the standardised state) is the same user's."""
    unit = F.normalize((states - states.mean(0)) / (states.std(0) + 1e-5), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2)
    return (owners[similarity.argmax(1)] == owners).float().mean().item()


def ridge_precision(states, truth, train, strength: float = 10.0) -> float:
    """Precision at k (k = how many the user likes) of a ridge probe, fitted on `train` rows, on the others."""
    x = (states - states[train].mean(0)) / (states[train].std(0) + 1e-5)
    a, b = x[train], truth[train] - truth[train].mean(0)
    weights = torch.linalg.solve(a.T @ a + strength * torch.eye(a.shape[1]), a.T @ b)
    scores = x[~train] @ weights + truth[train].mean(0)
    return np.mean(
        [row[s.topk(int(row.sum())).indices].mean().item() for s, row in zip(scores, truth[~train], strict=True)]
    )


def main() -> None:
    args = arguments("probe_layers", __doc__)
    run = core.Run(args)
    if run.finished:
        return
    users, world = Extracted(args.runs), histories_of(args.config, args.runs)
    people, owners = np.unique(users.owners, return_inverse=True)
    people = people[: args.users]
    rows = torch.from_numpy(owners < len(people))
    owners, hidden = torch.from_numpy(owners)[rows], users.hidden[rows]
    liked = torch.zeros(len(people), len(world.attributes))
    for i, user in enumerate(people.tolist()):
        liked[i, [a for taste in world.tastes(user) for a in taste]] = 1
    liked = liked[owners]
    train = owners < len(people) * 4 // 5
    shuffle = torch.randperm(len(owners), generator=torch.Generator().manual_seed(args.seed))
    probe = torch.nonzero(~train)[:900, 0]
    table = []
    for layer in range(hidden.shape[1]):
        states = hidden[:, layer]
        table.append(
            {
                "layer": layer,
                "same_user": retrieval(states[probe], owners[probe]),
                "liked_precision": ridge_precision(states, liked, train),
                "liked_precision_shuffled": ridge_precision(states, liked[shuffle], train),
            }
        )
    layers = hidden.shape[1]
    middle_to_upper = range(layers // 2, layers - 1)
    chosen = {
        "sem_layers": list(range(layers - 4, layers)),
        "core_layer": max(middle_to_upper, key=lambda i: table[i]["same_user"]),
    }
    core.write_atomic(run.folder / "layers.json", json.dumps(chosen).encode())
    draw(table, run.folder / "layers.png")
    run.finish(table=table, **chosen)


def draw(table: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key, style in (("same_user", "o-"), ("liked_precision", "s-"), ("liked_precision_shuffled", ":")):
        axis.plot([r["layer"] for r in table], [r[key] for r in table], style, label=key.replace("_", " "))
    axis.set(xlabel="decoder layer", ylabel="share", ylim=(0, 1), title="What each layer knows of unseen users")
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
