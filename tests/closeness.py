"""The one way in which tests compare numbers: tolerances that scale with the values and with their precision.

Another CPU, another number of threads, another batch size or another kernel rounds each product a little differently.
What comes out differs by some units in the last place *of the largest value that went in*, never by a fixed 1e-5. So
a tolerance here is a number of such units: `ulps * eps(dtype) * max |expected|`.

`torch.equal` stays right where the very same operations run twice on tensors of the very same shapes: weight 0, the
order of two nodes, queueing again, resuming. Where the shapes, the kernels or the order of additions differ, use
`assert_close`, and show by `unlike` that what the test is about is at least EFFECT times what it lets pass.
"""

import numpy as np
import torch

# 3e-5 of the largest value in float32: a small network, forward. A sampling run needs more, as guidance multiplies.
ULPS = 256
# How many times the tolerance an effect must be before a comparison can be said to tell it apart.
EFFECT = 100


def _tensor(values) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    return torch.as_tensor(np.asarray(values))


def _epsilon(*tensors: torch.Tensor) -> float:
    """The coarsest precision among the tensors; that of float32 at least, which numbers pass through on their way."""
    precisions = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    return max([*precisions, torch.finfo(torch.float32).eps])


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def tolerance(actual, expected, ulps: float = ULPS, scale: float | None = None) -> float:
    """The largest difference that passes: `ulps` units in the last place of `scale`, or of the largest |expected|."""
    actual, expected = _tensor(actual), _tensor(expected)
    largest = _largest(expected.double()) if scale is None else scale
    return ulps * _epsilon(actual, expected) * largest


def assert_close(actual, expected, *, ulps: float = ULPS, scale: float | None = None, unlike=None) -> None:
    """Two tensors, arrays or numbers of one shape agree within rounding.

    scale: what the rounding is relative to, if it isn't the largest |expected|: the summands of a sum that cancels.
    unlike: what would come out if the behaviour under test were gone. It must lie EFFECT tolerances away.
    """
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = tolerance(actual, expected, ulps, scale)
    if unlike is not None:
        assert_far(expected, unlike, allowed * EFFECT)
    # A NaN is never close, and never the worst by max(): it is looked for first.
    assert torch.isfinite(actual.double()).all(), f"{(~torch.isfinite(actual.double())).sum()} values are not finite"
    difference = (actual.double() - expected.double()).abs()
    if not difference.numel() or difference.max() <= allowed:
        return
    place = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    raise AssertionError(
        f"differs by {difference.max().item():.3g} at {place}: {actual[place].item():.7g}, expected "
        f"{expected[place].item():.7g}; allowed are {allowed:.3g} ({ulps:g} ulps of {allowed / ulps:.3g}); "
        f"{int((difference > allowed).sum())} of {difference.numel()} values are off"
    )


def assert_far(one, other, least: float | None = None, *, ulps: float = ULPS, scale: float | None = None) -> None:
    """Two tensors of one shape differ somewhere by at least `least`: EFFECT times what assert_close lets pass."""
    one, other = _tensor(one).double(), _tensor(other).double()
    assert one.shape == other.shape, f"shapes differ: {tuple(one.shape)}, {tuple(other.shape)}"
    largest = max(_largest(one), _largest(other)) if scale is None else scale
    least = EFFECT * ulps * torch.finfo(torch.float32).eps * largest if least is None else least
    worst = _largest(one - other)
    assert worst >= least, f"differ by {worst:.3g} at most; an effect of {least:.3g} is needed to tell them apart"
