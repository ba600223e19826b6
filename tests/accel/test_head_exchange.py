"""Tokens exchanged for heads, and back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks

from accel.errors import AccelError
from accel.head_exchange import Exchange, pieces_of, streams_of
from accel.layout import Layout
from accel.ranks import Ranks

HEADS = ((0, 5, 3), (), (4, 1))  # head 2 is nobody's
STREAMS = (5, 16)  # neither divides by three


def test_text_with_its_padding_is_a_stream_and_so_are_images():
    layout = Layout.join([("text", 4), ("pad", 3), (1, 5, 3), ("reference", 6)])
    assert streams_of(layout) == (7, 21)
    assert streams_of(Layout.of((2, 3, 5))) == (30,)
    assert streams_of(Layout.of((2, 3, 5), text_after=2, padding=4)) == (30, 6)


@given(st.lists(st.integers(4, 30), min_size=1, max_size=3), st.integers(1, 4))
def test_pieces_are_what_tensor_split_makes(streams, ranks):
    tokens = torch.arange(sum(streams))
    split = [stream.tensor_split(ranks) for stream in tokens.split(streams)]
    for rank, ranges in enumerate(pieces_of(streams, ranks)):
        held = torch.cat([stream[rank] for stream in split])
        assert torch.equal(torch.cat([tokens[a:b] for a, b in ranges]), held)


def whole(batch=2, heads=6, dim=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, sum(STREAMS), dim, generator=generator) for _ in range(3)]


def there_and_back(rank):
    ranks = Ranks(None, rank, 3, alike=False)
    pieces = pieces_of(STREAMS, 3)
    held = torch.cat([torch.arange(a, b) for a, b in pieces[rank]])
    exchange = Exchange(ranks, HEADS, pieces, torch.device("cpu"))
    # as a host has them: tokens first in memory
    own = [x[:, :, held].transpose(1, 2).contiguous().transpose(1, 2) for x in whole()]
    got = exchange.to_heads(*own)
    out = torch.full_like(own[0], 7.0)
    exchange.to_tokens(got[0] + got[1] * got[2], out)
    half = exchange.to_heads(*(x.bfloat16() for x in own))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half, got, strict=True))
    sizes = ranks.sizes(len(held), torch.device("cpu"))
    return got, out, held, sizes


def test_ranks_get_whole_sequences_of_their_heads(tmp_path):
    q, k, v = whole()
    expected = q + k * v
    expected[:, 2] = 7.0
    found = on_ranks(3, there_and_back, tmp_path)
    for rank, (got, out, held, sizes) in enumerate(found):
        for x, own in zip((q, k, v), got, strict=True):
            assert torch.equal(own, x[:, list(HEADS[rank])])
        assert torch.equal(out, expected[:, :, held])
        assert out.transpose(1, 2).is_contiguous(), "as the host had it"
        assert sizes == (8, 7, 6)


def config(**changes):
    mesh = SimpleNamespace(get_group=lambda: None)
    given = {"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": False}
    context = SimpleNamespace(**{**given, **changes}, _ulysses_mesh=mesh)
    return SimpleNamespace(context_parallel_config=context)


def test_a_ring_is_refused():
    with pytest.raises(AccelError, match=r"ring_degree=2 .* a part of the keys at a time"):
        Ranks.of(config(ring_degree=2))


def test_without_context_parallelism_there_are_no_ranks():
    assert Ranks.of(None) is None
    assert Ranks.of(SimpleNamespace(context_parallel_config=None)) is None
