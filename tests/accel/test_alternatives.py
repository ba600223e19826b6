"""Alternatives: every head takes the option that errs least, with its order and its rest."""

import json

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Alternatives, Choice
from accel.errors import PlanError
from accel.estimators import BlockMassTopK, Joined, Pooled, estimator_from_dict
from accel.kernels.attention import sparse_attention
from accel.layout import Layout
from accel.masks import site_mask
from accel.pattern import Band, Full, Identity, Share, Skip, Window

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
BLOCK = (16, 8)
BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 12
SPATIAL, TEMPORAL = Choice(Band(0.1)), Choice(Band(0.1), order="hwt")
OPTIONS = (
    SPATIAL,
    TEMPORAL,
    Choice(BlockMassTopK(0.2), order="hilbert", rest="mean"),
    Choice(Skip()),
    Choice(Window(0, 1, 1), order="tile(2,2,3)", rest="taylor"),
)


def tensors(layout=LAYOUT, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, layout.length, DIM) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attended(choices, q, k, v, layout=LAYOUT, **settings):
    """The output of the kernels under these choices, and the mask."""
    chosen = site_mask(choices, q, k, v, layout=layout, block=BLOCK, lse={}, **settings)
    out = sparse_attention(
        q, k, v, chosen.mask, rest=chosen.rest, order=chosen.order, kv_length=chosen.kv_length
    )
    return out, chosen


def dense(q, k, v):
    k, v = (x[:, :, : LAYOUT.valid_length].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def errors(q, k, v, options):
    """Squared error of each option's own kernel output over all valid rows, [options, heads]."""
    exact = dense(q, k, v)
    wrong = torch.stack([attended((option,) * HEADS, q, k, v)[0] - exact for option in options])
    return wrong[..., : LAYOUT.valid_length, :].square().sum((1, 3, 4))


@pytest.mark.parametrize("options", [OPTIONS[:2], OPTIONS[1:4], OPTIONS])
def test_every_head_takes_what_errs_least(options):
    q, k, v = tensors()
    expected = errors(q, k, v, options).argmin(0).tolist()
    choice = Choice(Alternatives(options, rows=LAYOUT.valid_length))
    out, chosen = attended((choice,) * HEADS, q, k, v)
    same, resolved = attended(tuple(options[i] for i in expected), q, k, v)
    assert torch.equal(chosen.mask.to_dense(), resolved.mask.to_dense().expand(BATCH, -1, -1, -1))
    assert chosen.rest == resolved.rest
    torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-5)


def planted(layout, by_frame):
    """A head whose tokens look at their frame, or at their place in all frames."""
    t, h, w = layout.coordinates().T
    turn = (t if by_frame else h * 7 + w)[:, None] * torch.tensor([0.9, 1.7, 2.3])
    return torch.cat([turn.sin(), turn.cos(), torch.zeros(layout.length, 6)], 1) * 3


def test_heads_of_space_and_of_time_are_told_apart():
    """One choice for all heads; their orders differ after it."""
    layout = Layout.of((6, 4, 7))
    q, k, v = tensors(layout, heads=4, kv_heads=4)
    for head, by_frame in enumerate((True, False, False, True)):
        q[:, head] = k[:, head] = planted(layout, by_frame)
    choice = Choice(Alternatives((SPATIAL, TEMPORAL)))
    found = choice.select.select(q, k, v, blocking=Blocking(layout, "thw", BLOCK))
    assert found.taken == (0, 1, 1, 0)
    _, chosen = attended((choice,) * 4, q, k, v, layout)
    natural, by_place = torch.arange(168), Blocking(layout, "hwt", BLOCK).indices()
    for head, order in enumerate((natural, by_place, by_place, natural)):
        assert torch.equal(chosen.order[head], order)


def test_a_head_beside_other_choices():
    q, k, v = tensors()
    choice, other = Choice(Alternatives(OPTIONS)), Choice(Pooled(0.3), order="morton", rest="mean")
    _, mixed = attended((other, choice, choice, other), q, k, v)
    _, alone = attended((choice,) * 4, q, k, v)
    for head in (1, 2):
        assert torch.equal(mixed.mask.to_dense()[:, head], alone.mask.to_dense()[:, head])
        assert torch.equal(mixed.order[head], alone.order[head])
        assert mixed.rest[head] == alone.rest[head]
    assert (mixed.rest[0], mixed.rest[3]) == ("mean", "mean")


def test_the_batch_decides_together():
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, "thw", BLOCK)
    select = Alternatives((SPATIAL, TEMPORAL), rows=LAYOUT.valid_length).select
    apart = [select(*(x[b : b + 1] for x in (q, k, v)), blocking=blocking) for b in range(BATCH)]
    found = select(q, k, v, blocking=blocking)
    assert len({a.taken for a in apart}) > 1  # or the test would say nothing
    assert found.taken == tuple(errors(q, k, v, (SPATIAL, TEMPORAL)).argmin(0).tolist())


def test_padding_is_not_looked_at():
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, "thw", BLOCK)
    select = Alternatives(OPTIONS).select
    expected = select(q, k, v, blocking=blocking, kv_length=90)
    for x in (q, k, v):
        x[:, :, 90:] = torch.nan
    found = select(q, k, v, blocking=blocking, kv_length=90)
    assert found.taken == expected.taken
    assert torch.equal(found.keep, expected.keep)


def test_all_that_is_made_lies_beside_q():
    q, k, v = tensors()
    choices = (Choice(Alternatives(OPTIONS)),) * HEADS
    expected = site_mask(choices, q, k, v, layout=LAYOUT, block=BLOCK, lse={})
    with torch.device("meta"):
        found = site_mask(choices, q, k, v, layout=LAYOUT, block=BLOCK, lse={})
    assert torch.equal(found.mask.to_dense(), expected.mask.to_dense())
    assert torch.equal(found.order, expected.order)


def test_heads_a_few_at_a_time(monkeypatch):
    q, k, v = tensors()
    blocking = Blocking(LAYOUT, "thw", BLOCK)
    whole = Alternatives(OPTIONS).select(q, k, v, blocking=blocking)
    monkeypatch.setattr("accel.choice.CHUNK_LOGITS", 1)
    parts = Alternatives(OPTIONS).select(q, k, v, blocking=blocking)
    assert parts.taken == whole.taken
    assert torch.equal(parts.keep, whole.keep)


def test_log_sums_are_handed_back_and_patterns_made_once():
    q, k, v = tensors()
    lse, patterns = {}, {}
    choice = Choice(Alternatives(OPTIONS))
    attended((choice,) * HEADS, q, k, v, patterns=patterns)
    assert len(patterns) == 4
    chosen = site_mask(
        (choice,) * HEADS, q, k, v, layout=LAYOUT, block=BLOCK, lse=lse, patterns=patterns
    )
    assert len(patterns) == 4
    assert set(lse) == set(range(HEADS))
    again = site_mask((choice,) * HEADS, q, k, v, layout=LAYOUT, block=BLOCK, lse=lse)
    assert torch.equal(again.mask.to_dense(), chosen.mask.to_dense())


def test_what_a_plan_holds():
    choice = Choice(Alternatives(OPTIONS, rows=32))
    again = Choice.from_dict(json.loads(json.dumps(choice.to_dict())))
    assert again == choice
    assert hash(again) == hash(choice)
    assert choice.name == again.name
    assert choice.name.startswith("alternatives(band(width=0.1) | band(width=0.1) hwt | ")
    assert choice.online
    assert not choice.dense


def test_what_is_known_of_its_cost():
    patterns = Alternatives((SPATIAL, TEMPORAL))
    assert (patterns.keep, patterns.work) == (None, "alternatives+alternatives/64")
    online = Alternatives(tuple(Choice(Pooled(0.3), order=o) for o in ("thw", "hwt")), rows=9)
    assert (online.keep, online.work) == (0.3, "pooled+pooled/9")
    assert Alternatives((Choice(Pooled(0.3)), Choice(Pooled(0.4)))).keep is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((SPATIAL,), "2 to 16 different options, got 1"),
        ((SPATIAL, SPATIAL), "different"),
        (tuple(Choice(Band(0.01 * i)) for i in range(17)), "2 to 16 different options, got 17"),
        ((SPATIAL, Choice(Identity())), "identity cannot be an option"),
        ((SPATIAL, Choice(Share())), "share cannot be an option"),
        ((SPATIAL, Choice(Alternatives((SPATIAL, TEMPORAL)))), "alternatives cannot be an option"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Alternatives(options)
    data = {"kind": "alternatives", "options": [option.to_dict() for option in options]}
    with pytest.raises(PlanError, match=message):
        Choice.from_dict({"select": data})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"options": "thw"}, "options"),
        ({"options": [{"select": {"kind": "bend", "width": 0.1}}] * 2}, "did you mean 'band'"),
        ({"options": [{"selct": {"kind": "full"}}] * 2}, "did you mean 'select'"),
        ({"options": [SPATIAL.to_dict(), TEMPORAL.to_dict()], "rows": 0}, "rows is a number"),
        ({"options": [SPATIAL.to_dict(), TEMPORAL.to_dict()], "rows": 10**6}, "rows is a number"),
    ],
)
def test_bad_files_are_refused(data, message):
    with pytest.raises(PlanError, match=message):
        Choice.from_dict({"select": {"kind": "alternatives", **data}})


def test_orders_and_rests_are_those_of_the_options():
    select = Alternatives((SPATIAL, TEMPORAL))
    for settings in ({"order": "hwt"}, {"rest": "mean"}):
        with pytest.raises(PlanError, match="give them to its options"):
            Choice(select, **settings)
    with pytest.raises(ValueError, match="join a pattern to its options"):
        Joined(select, Band(0.1))
    rows = Alternatives((SPATIAL, Choice(BlockMassTopK(0.2, every=3))))
    with pytest.raises(ValueError, match="every=3"):
        rows.check_block(BLOCK)
    assert estimator_from_dict(select.to_dict()) == select


def test_an_option_that_keeps_everything_is_exact():
    q, k, v = tensors()
    out, chosen = attended((Choice(Alternatives((SPATIAL, Choice(Full())))),) * HEADS, q, k, v)
    assert chosen.order is None
    valid = LAYOUT.valid_length
    torch.testing.assert_close(out[:, :, :valid], dense(q, k, v)[:, :, :valid])


def test_options_weigh_mass_in_their_own_orders():
    """Two options that do the same work in different orders share none of it."""
    q, k, v = tensors()
    options = (Choice(BlockMassTopK(0.2)), Choice(BlockMassTopK(0.2), order="hwt"))
    both = Alternatives(options)
    found = both.select(q, k, v, blocking=Blocking(LAYOUT, "thw", BLOCK))
    assert found.taken is not None
    for head, option in enumerate(found.taken):
        order = options[option].order
        alone = options[option].select.select(q, k, v, blocking=Blocking(LAYOUT, order, BLOCK))
        assert torch.equal(found.keep[:, head], alone.keep[:, head])
    single = Alternatives((options[1], Choice(Skip())))
    assert single.select(q, k, v, blocking=Blocking(LAYOUT, "thw", BLOCK)).taken == (0,) * HEADS
