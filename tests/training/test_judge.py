"""Covering the prop in the judge's training pictures leaves no trace of which prop it was."""

import pytest
import torch

from prefgen.atelier.attributes import FAMILIES, PROPS
from prefgen.atelier.renderer import Scene, render
from training.atelier.judge import hide_props

LOOK = {family: values[0].name for family, values in FAMILIES.items()}


@pytest.mark.parametrize("composition", [a.name for a in FAMILIES["composition"]])
def test_a_covered_prop_leaves_no_trace(composition):
    scenes = [Scene.of("owl", prop, LOOK | {"composition": composition}, 5) for prop in PROPS]
    pictures = torch.stack([torch.from_numpy(render(s)).movedim(-1, 0).float() / 255 for s in scenes])
    assert (pictures[1:] - pictures[0]).abs().amax((1, 2, 3)).min() > 0.2, "the props must show before they are covered"
    repeated = torch.full((len(scenes),), composition == "repeated")
    torch.manual_seed(0)
    covered, which = hide_props(pictures, repeated, share=1.0)
    assert which.all()
    # Every cover has a colour of its own: compare what lies outside of it.
    same = (covered != pictures).any(0).any(0)
    assert ((covered - covered[0]).abs().amax((0, 1)) <= 1 / 255)[~same].all()


def test_no_share_covers_nothing():
    pictures = torch.rand(3, 3, 128, 128)
    untouched, which = hide_props(pictures, torch.zeros(3, dtype=torch.bool), share=0.0)
    assert torch.equal(untouched, pictures) and not which.any()
