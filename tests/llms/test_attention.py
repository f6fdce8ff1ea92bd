"""Attention behind a shared head: the same as with the head copied in front of every row, forwards and backwards."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_llm
from torch.nn.functional import scaled_dot_product_attention

from latentwire.llms import attention
from latentwire.llms.attention import Packed, alike, attend, behind_each_other, branching
from latentwire.models.backbones import load_backbone

LENGTHS, HEAD, WIDTH = (3, 6, 1), 7, 8


@pytest.mark.parametrize("made", ["llm", "backbone"])
def test_no_model_attends_by_cudnns_kernels(texts, encoder_folder, made):
    torch.backends.cuda.enable_cudnn_sdp(True)  # as PyTorch begins
    make_llm("qwen", texts[:50]) if made == "llm" else load_backbone(encoder_folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def plainly(query, key, value, head):
    """One row by PyTorch's own attention: its keys and values behind the head's pieces; [Q, N, D]."""
    head = [torch.cat(pieces, dim=2) for pieces in zip(*head, strict=True)]
    times, before = len(query) // len(key), key.shape[1] - query.shape[1]
    key, value = (torch.cat([h[0], x], 1).repeat_interleave(times, 0) for h, x in zip(head, (key, value), strict=True))
    seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(HEAD + before)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(0, 1)


def packed_of(lengths):
    """Rows of these lengths, one behind the other."""
    return Packed.of(torch.arange(sum(lengths)).split(lengths), torch.device("cpu"))


@pytest.fixture(params=[128, 2], ids=["one block", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", request.param)


def states(heads, groups, length, rows, seed=0):
    """Queries, keys and values of rows, and the keys and values of a head: of a piece that learns nothing, and of one
    that learns, whose gradients are wanted too."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads, length), *[(rows, groups, length)] * 2, *[(1, groups, HEAD - 3)] * 2, *[(1, groups, 3)] * 2
    query, key, value, *head = (torch.randn(*shape, WIDTH, generator=generator) for shape in shapes)
    learned = [x.requires_grad_() for x in (query, key, value, *head[2:])]
    return learned, [tuple(head[:2]), tuple(head[2:])]


def attended(own, head, mask, **how):
    module = SimpleNamespace(layer_idx=1, num_key_value_groups=own[0].shape[1] // own[1].shape[1], is_causal=True)
    return attend(module, *own[:3], mask, head=[None, head], dropout=0.0, **how)[0]


def same(found, expected, own):
    torch.testing.assert_close(found, expected)
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, own, wanted) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4)])
def test_rows_without_padding_are_read_each_behind_the_head(heads, groups):
    own, head = states(heads, groups, sum(LENGTHS), 1)
    packed = packed_of(LENGTHS)
    found = attended(own, head, packed.real[:, None, None], packed=packed)
    rows = zip(*(x[0].split(LENGTHS, dim=1) for x in own[:3]), strict=True)
    same(found, torch.cat([plainly(*row, head) for row in rows])[None], own)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("queries", [1, 3])
def test_the_last_positions_of_rows_see_the_head_and_what_came_before(queries):
    (query, key, value, *more), head = states(6, 2, max(LENGTHS), len(LENGTHS))
    own = [query[:, :, -queries:].detach().requires_grad_(), key, value, *more]
    longer = [max(length, queries) for length in LENGTHS]  # the queries themselves are no padding
    real = packed_of(longer).real
    found = attended(own, head, real[:, None, None])
    rows = [plainly(own[0][i], key[i, :, -length:], value[i, :, -length:], head) for i, length in enumerate(longer)]
    same(found, torch.stack(rows), own)


def test_rows_go_into_a_padded_batch_and_back():
    packed = packed_of(LENGTHS)
    row = torch.arange(1.0, 1 + sum(LENGTHS))
    padded = packed.padded(row[None, None, :, None])
    real = padded[:, 0, :, 0] * packed.real
    assert real.tolist() == [[0, 0, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 10]]
    assert torch.equal(packed.packed(padded.transpose(1, 2))[0, :, 0, 0], row)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "most, trees",
    [
        (128, [[0, 1, 2, 3, 4, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10]]),
        (1, [[0, 1, 2, 3, 4, 11], [5, 6, 7, 8, 9, 10], [0, 1, 2, 12, 13, 14]]),  # as many as the slot has: three
    ],
)
def test_rows_that_begin_alike_read_what_they_share_once(monkeypatch, most, trees):
    monkeypatch.setattr("latentwire.llms.attention._BRANCHES", most)
    begun, rests = [torch.zeros(3, 1), torch.zeros(2, 1)], [torch.zeros(length, 1) for length in (2, 4, 1, 3)]
    slots = [begun[0], begun[1], begun[0], begun[0]]
    parts, rows, begins = behind_each_other(slots, rests, [0, 1, 0, 0])
    assert [len(part) for part in parts] == [3, 2, 2, 4, 1, 3] and begins == {0: 0, 1: 5}
    assert [row.tolist() for row in rows] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [0, 1, 2, 11], [0, 1, 2, 12, 13, 14],
    ]  # fmt: skip
    own, head = states(6, 2, 15, 1)
    found_trees, branches = branching(rows, slots, [0, 1, 0, 0])
    assert [tree.tolist() for tree in found_trees] == trees
    packed = Packed.of(found_trees, torch.device("cpu"))
    found = attended(own, head, packed.seen(branches), packed=packed)
    each = [plainly(*(x[0][:, row] for x in own[:3]), head) for row in rows]
    expected = torch.cat([each[0], each[1], each[2][3:], each[3][3:]])
    same(found, expected[None], own)


def test_only_what_learns_nothing_is_the_same_by_its_numbers():
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    learned = torch.ones(2, 3, requires_grad=True)
    assert alike([one, other, one.clone(), torch.ones(3, 3), one]) == [0, 1, 0, 3, 0]
    assert alike([learned, one, learned, learned.clone()]) == [0, 1, 0, 3]
    assert alike([one, one, one.clone(), one], [other, None, other.clone(), other + 1]) == [0, 1, 0, 3]
