"""Muon as the atelier's stages use it: which weights it moves how, and that a stopped run goes on with it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from tests.closeness import assert_close
from training.common.optim import OptimiserError, muon, optimiser_of

RATE = 0.01


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 16)
        self.linear = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.conv = nn.Conv1d(24, 3, 1)

    def forward(self, ids):
        return self.conv(self.norm(self.linear(self.words(ids))).transpose(1, 2))


def taken(net, optimiser, steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 12, (8, 5), generator=generator)
        net(ids).square().mean().backward()
        for group in optimiser.param_groups:
            group["lr"] = RATE
        optimiser.step()
        optimiser.zero_grad()
    return net


def test_layers_move_by_an_orthogonal_matrix_and_the_rest_by_adamw():
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net)
    taken(net, muon(net, 0.0, fallback=0.5))
    # Scaled so that the mean square of a step is that of AdamW, 0.2 of the rate: 0.2 * sqrt(24) for every direction.
    # The gradient of twelve words has less than sixteen directions; five iterations leave the weakest behind.
    spread = torch.linalg.svdvals(net.linear.weight - before.linear.weight) / (RATE * 0.2 * 24**0.5)
    assert 0.9 < spread[7] and spread[0] < 1.2
    # The first step of AdamW with Nesterov's momentum is 1.9 times the rate, whatever the gradient. Three rows are too
    # few to be orthogonalised.
    for name in ("words.weight", "norm.weight", "linear.bias", "conv.weight"):
        moved = (net.get_parameter(name) - before.get_parameter(name)).abs()
        assert_close(moved.max(), torch.tensor(RATE * 0.5 * 1.9), ulps=4096)


def test_only_layers_decay():
    torch.manual_seed(0)
    net = Net()
    optimiser = muon(net, 0.1)
    layers, rest = optimiser.param_groups
    assert {id(p) for p in layers["params"]} == {id(net.linear.weight), id(net.conv.weight)}
    assert layers["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert (
        rest["betas"] == (0.9, 0.99) and optimiser_of("muon", net, 0.1, (0.9, 0.98)).param_groups[1]["betas"][1] == 0.98
    )
    assert len(layers["params"]) + len(rest["params"]) == len(list(net.parameters()))
    net.linear.weight = net.words.weight  # as a language model's output layer may be
    assert id(net.words.weight) not in {id(p) for p in muon(net, 0.1).param_groups[0]["params"]}
    net.words.requires_grad_(False)
    assert len(muon(net, 0.1).param_groups[1]["params"]) == len(rest["params"]) - 1


def test_a_stopped_run_goes_on_exactly():
    torch.manual_seed(0)
    straight = Net()
    stopped = copy.deepcopy(straight)
    taken(taken(straight, (optimiser := muon(straight, 0.1)), 3, seed=1), optimiser, 3, seed=2)
    taken(stopped, (first := muon(stopped, 0.1)), 3, seed=1)
    second = muon(stopped, 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    taken(stopped, second, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), stopped.parameters(), strict=True))


def test_weights_that_muon_would_move_as_something_else_are_refused():
    """LoRA's matrices alone would all fall back to AdamW; a share of a matrix that FSDP cut isn't orthogonal to the
    rest."""
    with pytest.raises(OptimiserError, match="LoRA weights are trained: take adamw"):
        optimiser_of("muon", nn.ParameterDict({"layer/lora_A": nn.Parameter(torch.zeros(4, 16))}), 0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(16, 24)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(OptimiserError, match="launch with DDP, or take adamw"):
            optimiser_of("muon", layer, 0.1)
    finally:
        dist.destroy_process_group()
