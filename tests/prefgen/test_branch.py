"""The branch's arithmetic: attention to user tokens, its weight, its mask."""

import torch

from prefgen.branch import user_residual
from tests.closeness import assert_close


def tensors(batch=2, tokens=12, width=16, user_tokens=4):
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, width)
    k, v = torch.randn(batch, user_tokens, width), torch.randn(batch, user_tokens, width)
    return q, k, v


def test_the_residual_is_softmax_attention_by_its_definition():
    q, k, v = tensors()
    heads, size = 4, 4
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = (q[b, :, part] @ k[b, :, part].T / size**0.5).softmax(-1)
            expected[b, :, part] = scores @ v[b, :, part]
    got = user_residual(q, k, v, heads, weight=0.5)
    assert_close(got, expected * 0.5, ulps=32)


def test_one_user_serves_a_whole_batch():
    q, k, v = tensors()
    one = user_residual(q, k[:1], v[:1], 4)
    many = user_residual(q, k[:1].repeat(2, 1, 1), v[:1].repeat(2, 1, 1), 4)
    assert_close(one, many, ulps=32, unlike=user_residual(q, k, v, 4))


def test_a_given_attention_is_used_and_the_dtype_is_the_querys():
    q, k, v = tensors()
    calls = []

    def attention(q, k, v, heads):
        calls.append(heads)
        return torch.ones_like(q, dtype=torch.float32) * v.mean()

    got = user_residual(q.half(), k, v, 4, weight=-2.0, attention=attention)
    assert calls == [4] and got.dtype == torch.float16
    assert torch.equal(got, (torch.ones_like(q) * (-2 * v).mean()).half())


def test_a_mask_of_ones_changes_nothing_and_a_mask_of_zeros_removes_the_user():
    q, k, v = tensors()
    free = user_residual(q, k, v, 4)
    assert torch.equal(free, user_residual(q, k, v, 4, torch.ones(1, 12, 1)))
    assert not user_residual(q, k, v, 4, torch.zeros(1, 12, 1)).any()
