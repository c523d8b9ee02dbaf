"""What a vector knows of a user, measured on users that no probe was fitted on.

The paper (arXiv 2512.06020) probes layers by inter-user and by intra-user discrimination: here `same_user` and
`named`, and `liked_first`. Every measure gives one number a user, so that intervals are drawn over users. `order` (a
permutation) and `signs` spoil the labels that a probe is fitted on: what is left then is chance.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

# Of each channel.
COLOUR_BINS = 4
# Of a ridge probe, in units of the inputs' width: views of different width are regularised alike.
RIDGE = 0.3


def standardised(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """x [..., D] with zero mean and unit variance over the rows of the reference [..., D]."""
    rows = reference.flatten(0, -2)
    return (x - rows.mean(0)) / (rows.std(0) + 1e-5)


def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Weights [D, C] from standardised x [n, D] to y [n, C]; solved on the rows, of which there are fewer."""
    return x.T @ torch.linalg.solve(x @ x.T + RIDGE * x.shape[1] * torch.eye(len(x)), y)


def same_user(x: torch.Tensor, order: torch.Tensor | None = None) -> np.ndarray:
    """Share of each user's histories x [users, histories, D] whose nearest other (cosine) is the user's, [users]."""
    users, histories, _ = x.shape
    rows = F.normalize(standardised(x, x).flatten(0, 1), dim=1)
    rows = rows if order is None else rows[order]
    similarity = rows @ rows.T
    similarity.fill_diagonal_(-2)
    owner = torch.arange(users).repeat_interleave(histories)
    return (owner[similarity.argmax(1)] == owner).float().view(users, histories).mean(1).numpy()


def named(x: torch.Tensor, order: torch.Tensor | None = None) -> np.ndarray:
    """Of each user's histories x [users, histories, D] the share that a linear probe gives to its user, [users].

    The probe (ridge onto one-hot users) is fitted on all histories but one of every user and asked about that one.
    order: a permutation of the users * (histories - 1) fitted rows.
    """
    users, histories, _ = x.shape
    right = torch.zeros(users)
    labels = torch.eye(users).repeat_interleave(histories - 1, 0)
    if order is not None:
        labels = labels[order]
    for left_out in range(histories):
        others = x[:, [i for i in range(histories) if i != left_out]]
        weights = ridge(standardised(others, others).flatten(0, 1), labels - labels.mean(0))
        scores = standardised(x[:, left_out], others) @ weights
        right += (scores.argmax(1) == torch.arange(users)).float()
    return (right / histories).numpy()


def liked_first(fitted: torch.Tensor, x: torch.Tensor, signs: torch.Tensor | None = None) -> np.ndarray:
    """Share of pairs in which the liked picture is put above the disliked one of the same history, [users].

    fitted [..., D], x [users, histories, D]: what was read with the liked picture less what was read with the disliked
    one, of the users of the probe and of others. signs [rows of fitted]: -1 where a pair's verdicts are exchanged.
    """
    rows = fitted.flatten(0, -2)
    scale = rows.square().mean(0).sqrt() + 1e-5
    labels = torch.ones(len(rows), 1) if signs is None else signs[:, None]
    score = (x / scale @ ridge(rows / scale, labels))[..., 0]
    return ((score > 0).float() + (score == 0) / 2).mean(1).numpy()


def traits(
    fitted: torch.Tensor, truth: torch.Tensor, x: torch.Tensor, x_truth: torch.Tensor, order: torch.Tensor | None = None
) -> np.ndarray:
    """Precision at k (k: how many attributes the user likes) of a linear probe that names liked attributes, [users].

    fitted [users, histories, D] with truth [users, attributes]; x and x_truth likewise, of others. order: a permutation
    of the probe's users.
    """
    labels = (truth if order is None else truth[order]).repeat_interleave(fitted.shape[1], 0)
    weights = ridge(standardised(fitted, fitted).flatten(0, 1), labels - labels.mean(0))
    scores = standardised(x, fitted) @ weights + labels.mean(0)
    return np.array(
        [
            np.mean([row[s.topk(int(row.sum())).indices].mean().item() for s in of_user])
            for of_user, row in zip(scores, x_truth, strict=True)
        ]
    )


def colours(picture: np.ndarray) -> torch.Tensor:
    """Mean colour and 3-D colour histogram of a picture uint8 [H, W, 3], [3 + COLOUR_BINS³]."""
    step = max(1, min(picture.shape[:2]) // 64)
    pixels = torch.from_numpy(np.ascontiguousarray(picture[::step, ::step])).reshape(-1, 3)
    bins = (pixels.long() * COLOUR_BINS // 256) @ torch.tensor([COLOUR_BINS * COLOUR_BINS, COLOUR_BINS, 1])
    return torch.cat([pixels.float().mean(0) / 255, torch.bincount(bins, minlength=COLOUR_BINS**3) / len(pixels)])


def likeness(parts: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How a liked picture goes with both sides of a history, less how a disliked one does, [..., 2 D].

    parts [..., 4, D]: means of the history's liked and disliked pictures, the liked and the disliked picture that are
    asked about. Products, because a linear probe can't compare pictures by itself; centred on the reference's mean.
    """
    liked, disliked, good, bad = standardised(parts, reference).unbind(-2)
    return torch.cat([(good - bad) * liked, (good - bad) * disliked], -1)
