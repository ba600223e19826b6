"""Layouts by sample and by site, and calls that are cut by them."""

import inspect
from dataclasses import replace

import pytest
import torch
from sessions import A, B, attend, qkv, session
from torch.nn.functional import scaled_dot_product_attention

from accel.choice import Choice
from accel.context import Where
from accel.estimators import BlockMassTopK
from accel.layout import Layout
from accel.layouts import Layouts, parts_of, valid_keys
from accel.pattern import Identity, Window
from accel.router import Session

NEAR = Choice(Window(t=0, h=0), order="hwt")
TOP = Choice(BlockMassTopK(keep=0.4))
GRID = (2, 5, 6)
# text of 4, 9 and 2 tokens before the grid, padded to 9; all in 70 tokens
RAGGED = [Layout.join([("text", n), ("pad", 9 - n), GRID, ("text", 1)]) for n in (4, 9, 2)]
LAST = [Layout.of(GRID, text_after=n, padding=10 - n) for n in (4, 9, 2)]


def test_one_layout_for_all_is_no_list():
    one, other = Layout.of(GRID), Layout.of((1, 5, 12))
    assert Layouts.of([one, one]) == Layouts.of(one) == Layouts((one,))
    assert Layouts.of([one, other]).samples == (one, other)
    assert Layouts.of({"a": one}).at("a") == (one,)
    assert Layouts.of({"a": one}).at("b") == ()
    assert Layouts((one,), {"b": other}).at("b") == (other,)
    assert Layouts((one,), {"b": other}).at("c") == (one,)
    assert Layouts((one,), {"b": other}).grids == {one.grids, other.grids}


@pytest.mark.parametrize("given", [[], {}, (3, 5, 7), [Layout.of(GRID), None], "thw"], ids=str)
def test_what_is_no_layout_is_refused(given):
    of = inspect.unwrap(Layouts.of.__func__)  # the tests' type check would refuse it first
    with pytest.raises(TypeError, match="expected a Layout"):
        of(Layouts, given)


def test_parts():
    parts = list(parts_of(tuple(RAGGED), torch.device("cpu")))
    x = torch.randn(3, 2, 70, 8)
    out = torch.full_like(x, 7.0)
    for sample, part in enumerate(parts):
        cut = part.cut(x)
        assert cut.shape == (1, 2, part.layout.length, 8)
        assert torch.equal(cut[0], x[sample][:, RAGGED[sample].valid()])
        part.put(out, cut)
    valid = valid_keys(tuple(RAGGED), x.device)
    assert torch.equal(out, torch.where(valid[:, None, :, None], x, 0.0))
    (whole,) = parts_of((LAST[0],), torch.device("cpu"))
    assert whole.cut(x) is not None
    assert whole.tokens is None, "padding that is last stays: kernels take a length"


@pytest.mark.parametrize("choice", [NEAR, TOP], ids=["pattern", "estimator"])
@pytest.mark.parametrize("layouts", [RAGGED, LAST], ids=["inside", "last"])
def test_a_batch_of_many_lengths_is_its_samples(layouts, choice):
    tensors = qkv(3, tokens=70)
    together = session(choice)
    together.begin(layouts, Where(0, 4))
    out, _ = attend(together, A, tensors)
    for sample, layout in enumerate(layouts):
        bare = [x[sample : sample + 1][:, :, layout.valid()] for x in tensors]
        one = session(choice)
        one.begin(layout.without_padding(), Where(0, 4))
        expected, _ = attend(one, A, bare)
        assert torch.allclose(out[sample][:, layout.valid()], expected[0], atol=1e-5)
    row = next(iter(together.records.values()))
    assert row.calls == 1
    assert 0 < row.keep < 1


def test_masks_of_samples_are_kept_apart_and_hold():
    one = session(TOP, dense_start=0.0)
    for step in range(2):
        one.begin(LAST, Where(step, 4))
        attend(one, A, qkv(3, tokens=70))
    assert {key.owner for key in one.run.masks} == {("a", f"[{sample}]") for sample in range(3)}


def test_sites_with_layouts_of_their_own():
    one = session(NEAR)
    one.begin(Layouts((Layout.of(GRID, text_after=4),), {"b": Layout.of(GRID)}), Where(0, 4))
    for site, tokens in ((A, 64), (B, 60)):
        out, dense = attend(one, site, qkv(tokens=tokens))
        assert not torch.allclose(out, dense)
    assert {key.layout.length for key in one.run.masks} == {64, 60}


def test_a_site_that_is_called_sample_by_sample():
    one = session(TOP)
    layouts = [Layout.of(GRID, text_after=n) for n in (4, 9)]
    one.begin(layouts, Where(0, 4))
    for layout in layouts:
        attend(one, A, qkv(tokens=layout.length))
    assert {key.owner for key in one.run.masks} == {("a", ""), ("a", "@1")}
    assert not one.notices


def test_samples_and_layouts_that_do_not_go_together():
    one = session(NEAR)
    one.begin(LAST, Where(0, 4))
    out, dense = attend(one, A, qkv(2, tokens=70))
    assert torch.equal(out, dense)
    assert "a has 2 samples, but layouts for 3" in one.notices


def test_the_keys_of_a_mask_have_to_be_those_of_the_layout():
    q, k, v = qkv(3, tokens=70)
    valid = valid_keys(tuple(LAST), q.device)
    dense = scaled_dot_product_attention(q, k, v, valid[:, None, None])

    def masked(valid):
        one = session(NEAR)
        one.begin(LAST, Where(0, 4))
        return one.attend(A, q, k, v, lambda: dense, None, valid), one.notices

    out, notices = masked(valid)
    assert not torch.allclose(out, dense)
    assert not notices
    out, notices = masked(~valid)
    assert torch.equal(out, dense)
    assert "the call has an attention mask that the layout does not explain" in notices


def test_heads_that_are_no_attention_in_a_ragged_batch():
    one = session(Choice(Identity()), NEAR)
    one.begin(LAST, Where(0, 4))
    q, k, v = qkv(3, tokens=70)
    out, _ = attend(one, A, (q, k, v))
    assert torch.equal(out[:, 0], v[:, 0])
    assert not torch.equal(out[:, 1], v[:, 1])


def test_other_text_is_the_same_run_and_another_grid_is_not():
    one = session(NEAR)
    one.begin(Layout.of(GRID, text_after=4), Where(0, 4))
    first = one.run
    one.begin(Layout.of(GRID, text_after=9), Where(0, 4, "uncond"))
    assert one.run is first
    one.begin(Layout.of((1, 5, 6), text_after=9), Where(1, 4))
    assert one.run is not first


def test_the_dense_kernel_honours_a_mask_that_is_explained():
    q, k, v = qkv(3, tokens=70)

    def dense_of(layouts, valid):
        one = session(Choice(BlockMassTopK(keep=0.4)), dense_start=1.0)
        one = Session(replace(one.plan, dense="kernel"), one.geometry)
        one.begin(layouts, Where(0, 4))
        host = scaled_dot_product_attention(q, k, v, valid[:, None, None])
        out = one.attend(A, q, k, v, lambda: host, None, valid)
        kernels = next(iter(one.records.values())).kernels
        assert torch.allclose(out[:, :, :62], host[:, :, :62], atol=1e-5)
        return kernels

    same = [LAST[2]] * 3
    assert dense_of(same, valid_keys(tuple(same), q.device)) == {"native"}
    assert dense_of(same, ~valid_keys(tuple(same), q.device)) == {"dense"}, "not what it says"
    assert dense_of(LAST, valid_keys(tuple(LAST), q.device)) == {"dense"}, "one length for each"
