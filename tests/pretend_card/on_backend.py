"""The pretend card itself: what it computes is the CPU's, what it refuses is what a card refuses, what it counts is so.
Run by tests/test_pretend_card.py in a process of its own."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from tests import pretend_card

pretend_card.insert()

CARD = torch.device("card", 0)


@pytest.fixture
def host():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def card(host):
    return host.to("card")


REFUSED = {
    "a product with the CPU": lambda a, c: c @ a.T,
    "a sum with the CPU": lambda a, c: c + a,
    "a sum with the other card": lambda a, c: c + a.to("card:1"),
    "cat": lambda a, c: torch.cat([c, a]),
    "where": lambda a, c: torch.where(a > 0, c, c),
    "masked_fill": lambda a, c: c.masked_fill(a > 0, 0.0),
    "linear": lambda a, c: F.linear(c, a),
    "index_select": lambda a, c: c.index_select(0, torch.tensor([0])),
    "an index of the card for the CPU": lambda a, c: a[torch.tensor([0], device="card")],
    "clamp by a tensor of the CPU": lambda a, c: c.clamp(min=torch.tensor(0.0)),
    "a mask of the CPU in an attention": lambda a, c: F.scaled_dot_product_attention(
        c[None], c[None], c[None], attn_mask=torch.zeros(1, 3, 3)
    ),
    "a product of integers": lambda a, c: c.long() @ c.long().T,
    "pinning": lambda a, c: c.pin_memory(),
    "a generator of the CPU": lambda a, c: torch.randn(3, device="card", generator=torch.Generator()),
    "numpy": lambda a, c: c.numpy(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_card_refuses_is_refused(host, card, what):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](host, card)


def test_what_a_card_lets_in_is_let_in(host, card):
    assert torch.equal((card + torch.tensor(2.0)).cpu(), host + 2)
    assert torch.equal(card[torch.tensor([0, 2])].cpu(), host[[0, 2]])
    assert torch.equal(card[host[:, 0] > 0].cpu(), host[host[:, 0] > 0])


def test_float64_can_be_refused(host, card):
    with pretend_card.Record(refuse=[torch.float64]):
        for make in (
            card.double,
            lambda: torch.zeros(3, dtype=torch.float64, device="card"),
            lambda: host.double().to(CARD),
        ):
            with pytest.raises(TypeError, match="doesn't support"):
                make()
    assert card.double().dtype == torch.float64


def test_views_share_memory(host, card):
    card[1].add_(1)
    card.view(-1)[0] = 7
    card.chunk(2, 1)[1].zero_()
    host[1].add_(1)
    host.view(-1)[0] = 7
    host.chunk(2, 1)[1].zero_()
    assert torch.equal(card.cpu(), host)
    assert card[0].untyped_storage().data_ptr() == card.untyped_storage().data_ptr()


def test_training_comes_to_the_same_weights():
    trained = []
    for device in ("cpu", "card"):
        torch.manual_seed(1)
        model = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        x = torch.randn(2, 7, 16)
        model.to(device)
        optimiser = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        for _ in range(3):
            optimiser.zero_grad()
            model(x.to(device)).pow(2).mean().backward()
            optimiser.step()
        trained.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*trained, strict=True))


def test_autocast_generators_pinning_pickles_and_copies(host, card):
    with torch.autocast("card", torch.bfloat16):
        assert (card @ card.T).dtype == torch.bfloat16 and (card @ card.T).softmax(-1).dtype == torch.float32
    drawn = torch.randn(4, device="card", generator=torch.Generator("card").manual_seed(3))
    assert torch.equal(drawn.cpu(), torch.randn(4, generator=torch.Generator().manual_seed(3)))
    assert host.pin_memory().is_pinned() and not host.is_pinned()
    file = io.BytesIO()
    torch.save({"card": card}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["card"], host)
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("card")).weight.device == CARD


def test_reads_uploads_and_living_bytes_are_counted(host, card):
    with pretend_card.Record() as record:
        card.sum().item(), card.tolist(), bool(card[0, 0] > 0), card[card > 0], card.nonzero(), card.cpu()
        host.to("card")
    assert (record.reads, record.uploads) == (6, 1)
    before = pretend_card.memory()
    tensor = torch.zeros(1000, device="card")
    view = tensor[5:]
    del tensor
    assert pretend_card.memory() - before == 4000
    del view
    assert pretend_card.memory() == before
