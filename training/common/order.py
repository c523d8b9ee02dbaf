"""Which samples a step sees, and its random numbers: pure functions, so that a checkpoint holds no generator state."""

from __future__ import annotations

import numpy as np


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of one process at one step. Processes draw different noise for their different samples."""
    # Process 0 draws what one process alone would.
    entropy = [seed, step, rank] if rank else [seed, step]
    # torch.manual_seed takes 63 bits and a sign.
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def batch_indices(seed: int, step: int, batch: int, count: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Indices [batch / world_size] of a shuffled pass over `count` samples: every sample once an epoch.

    batch: of all processes together. Rank r of `world_size` gets the r-th part; the parts in order are the batch of one
    process. Raises ValueError for a batch that can't be shared equally.
    """
    if batch % world_size:
        raise ValueError(f"a batch of {batch} can't be shared equally by {world_size} processes")
    share = batch // world_size
    positions: np.ndarray = step * batch + rank * share + np.arange(share)
    indices: np.ndarray = np.empty(share, np.int64)
    for epoch in np.unique(positions // count):
        order = np.random.default_rng([seed, int(epoch)]).permutation(count)
        inside = positions // count == epoch
        indices[inside] = order[positions[inside] % count]
    return indices
