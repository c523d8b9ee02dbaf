"""The one way in which tests compare numbers: tolerances that scale with the values and with their precision.

Another CPU, another number of threads, another batch size or another kernel rounds each product a little differently.
What comes out differs by some units in the last place *of the largest value that went in*, never by a fixed 1e-5. So
a tolerance here is a number of such units: `ulps * eps(dtype) * max |expected|`.

`torch.equal` stays right where the very same operations run twice on tensors of the very same shapes: weight 0, the
order of two nodes, queueing again, resuming. Where the shapes, the kernels or the order of additions differ, use
`assert_close`, and show by `unlike` that what the test is about is at least EFFECT times what it lets pass.
`pytest --perturb SEED` tells the two apart (tests/perturb.py).
"""

import numpy as np
import torch

# 3e-5 of the largest value in float32: a small network, forward.
ULPS = 256
# A few guided steps: guidance and the model multiply the differences of every step before.
SAMPLED = 2048
# How many times the tolerance an effect must be before a comparison can be said to tell it apart.
EFFECT = 100
# That, as a share of the largest value: 0.3 %.
FAR = EFFECT * ULPS * torch.finfo(torch.float32).eps


def _tensor(values) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    return torch.as_tensor(np.asarray(values))


def _epsilon(*values) -> float:
    """The coarsest precision among the tensors and arrays; Python's numbers are taken for float32's."""
    dtypes = [_tensor(v).dtype for v in values if isinstance(v, (torch.Tensor, np.ndarray))]
    return max([torch.finfo(d).eps for d in dtypes if d.is_floating_point] or [torch.finfo(torch.float32).eps])


def _largest(values: torch.Tensor) -> float:
    return values.double().abs().max().item() if values.numel() else 0.0


def difference(one, other, dim: int | None = None) -> torch.Tensor:
    """The largest |one - other| as a share of the largest |other|; over a dimension, if it is given."""
    one, other = _tensor(one).double(), _tensor(other).double()
    assert one.shape == other.shape, f"shapes differ: {tuple(one.shape)}, {tuple(other.shape)}"
    dims = tuple(range(one.ndim)) if dim is None else dim
    return (one - other).abs().amax(dims) / other.abs().amax(dims)


def assert_close(actual, expected, *, ulps: float = ULPS, scale: float | None = None, unlike=None) -> None:
    """Two tensors, arrays or numbers of one shape agree within rounding.

    ulps: units in the last place of `scale`, in the coarser precision of the two.
    scale: what the rounding is relative to, if it isn't the largest |expected|: the summands of a sum that cancels.
    unlike: what would come out if the behaviour under test were gone. It must lie EFFECT tolerances away.
    """
    epsilon = _epsilon(actual, expected)
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = _largest(expected) if scale is None else float(scale)
    allowed = ulps * epsilon * scale
    if unlike is not None:
        effect = _largest(expected.double() - _tensor(unlike).double())
        assert effect >= EFFECT * allowed, f"an effect of {effect:.3g} is too small to be told by {allowed:.3g}"
    # A NaN is never close, and never the worst by max(): it is looked for first.
    odd = int((~torch.isfinite(actual.double())).sum())
    assert not odd, f"{odd} of {actual.numel()} values are not finite"
    differences = (actual.double() - expected.double()).abs()
    if not differences.numel() or differences.max() <= allowed:
        return
    place = tuple(int(i) for i in np.unravel_index(int(differences.argmax()), differences.shape))
    raise AssertionError(
        f"differs by {differences.max().item():.3g} at {place}: {actual[place].item():.7g}, expected "
        f"{expected[place].item():.7g}; {allowed:.3g} is allowed ({ulps:g} ulps of {scale:.3g}, so it would take "
        f"{differences.max().item() / (epsilon * scale or 1):.0f}); {int((differences > allowed).sum())} of "
        f"{differences.numel()} values are off"
    )


def assert_far(one, other, least: float = FAR) -> None:
    """Two tensors differ somewhere by `least` of the largest value: EFFECT times what assert_close lets pass."""
    worst = difference(one, other).item()
    assert worst >= least, f"differ by {worst:.3g} of the largest value at most; {least:.3g} is needed"


def assert_learnt_alike(one: dict, two: dict, rate: float) -> None:
    """Weights {name: tensor} after the same few steps of Adam, in other shares or pieces, are the same.

    Adam divides a gradient by its own size: of one that is next to nothing it takes the last bits and makes a whole
    step of them, so single weights may lie a step apart on any CPU. In the mean they lie within 1 / EFFECT of one
    step, `rate`; other samples, or gradients that weren't shared, would make it about one step.
    """
    assert one.keys() == two.keys()
    for name, weight in one.items():
        apart = (weight.double() - two[name].double()).abs().mean().item()
        assert apart <= rate / EFFECT, f"{name}: {apart:.3g} apart in the mean, {rate / EFFECT:.3g} is allowed"
