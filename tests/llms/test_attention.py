"""Attention behind a shared head: the same as with the head copied in front of every row, forwards and backwards."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from latentwire.llms import attention
from latentwire.llms.attention import attend, own_mask

ROWS, HEAD, WIDTH = 3, 7, 8


def copied(query, key, value, mask, head):
    """The same by PyTorch's own attention, on keys and values that hold the head."""
    times = query.shape[1] // key.shape[1]
    whole = [torch.cat([h.expand(ROWS, -1, -1, -1), own], 2) for h, own in zip(head, (key, value), strict=True)]
    key, value = (x.repeat_interleave(times, dim=1) for x in whole)
    return scaled_dot_product_attention(query, key, value, attn_mask=pad(mask, (HEAD, 0))).transpose(1, 2)


@pytest.mark.parametrize("few", [128, 0], ids=["joint", "fused"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 6), (3, 6)], ids=["prefill", "a token", "an answer"])
def test_a_shared_head_is_read_as_if_each_row_had_it(monkeypatch, few, heads, groups, queries, keys):
    monkeypatch.setattr(attention, "_FEW", few)
    generator = torch.Generator().manual_seed(0)
    query, key, value, *head = (
        torch.randn(*shape, WIDTH, generator=generator)
        for shape in ((ROWS, heads, queries), *[(ROWS, groups, keys)] * 2, *[(1, groups, HEAD)] * 2)
    )
    own = [x.requires_grad_() for x in (query, key, value)]
    real = torch.ones(ROWS, keys)
    real[1, :2] = 0  # padding, which nobody sees
    mask = own_mask(real, queries, torch.float32)
    module = SimpleNamespace(layer_idx=1, num_key_value_groups=heads // groups, is_causal=True)
    found, _ = attend(module, *own, mask, head=[None, tuple(head)], dropout=0.0)
    expected = copied(*own, mask, head)
    torch.testing.assert_close(found, expected)
    wanted = torch.randn(expected.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, own, wanted), torch.autograd.grad(expected, own, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_query_sees_no_padding_and_nothing_later():
    mask = own_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 2, torch.float32) == 0
    assert mask[:, 0].tolist() == [
        [[False, True, True, False], [False, True, True, True]],
        [[True, True, True, False], [True, True, True, True]],
    ]
