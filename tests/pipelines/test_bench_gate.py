"""The truth of the benchmark is that of the kernels' references, on the rows that are sampled."""

import math

import pytest
import torch
from bench_cases import CASE, qkv

from accel.kernels.estimator_reference import antidiagonal_scores_reference
from accel.kernels.reference import block_mass_reference, sparse_attention_reference
from accel.pipelines.bench.gate import (
    STATED,
    attention_gate,
    attention_rows,
    mass_rows,
    relative_error,
    sampled,
)
from accel.pipelines.bench.inputs import per_head_order, random_mask

BLOCK = (64, 32)
CPU = torch.device("cpu")


def mask_of(keep=0.25, rows="uneven"):
    return random_mask(CASE, BLOCK, keep, rows, CPU)


@pytest.mark.parametrize("count", [1, 7, 301, 400])
def test_the_last_place_is_always_sampled(count):
    places = sampled(301, count)
    assert len(places) == min(count, 301)
    assert places[-1] == 300
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("masked", [True, False])
def test_attention_on_sampled_rows_is_the_reference(masked):
    inputs, rows = qkv(), sampled(301, 20)
    whole = mask_of(1.0, "uniform")
    mask = mask_of() if masked else None
    truth = sparse_attention_reference(*inputs, mask or whole)[:, :, rows]
    torch.testing.assert_close(attention_rows(inputs, rows, mask, torch.float64), truth)


@pytest.mark.parametrize("rest", ["drop", "mean", "taylor"])
@pytest.mark.parametrize("ordered", [True, False])
def test_orders_and_rests_are_those_of_the_reference(ordered, rest, monkeypatch):
    inputs, rows, mask = qkv(), sampled(301, 20), mask_of()
    # several groups of blocks, and a ragged last one
    for module in ("pipelines.bench.gate", "kernels.reference"):
        monkeypatch.setattr(f"accel.{module}.TAYLOR_GROUP", 4)
    options = {"order": per_head_order(CASE, CPU) if ordered else None, "rest": rest}
    truth = sparse_attention_reference(*inputs, mask, **options)[:, :, rows]
    found = attention_rows(inputs, rows, mask, torch.float64, **options)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("rest", ["drop", "mean", "taylor"])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_has_another_order_or_rest_does_not_pass(ordered, rest):
    inputs, mask = qkv(), mask_of()
    options = {"order": per_head_order(CASE, CPU) if ordered else None, "rest": rest}
    gate = attention_gate(inputs, mask, 16, **options)
    right = sparse_attention_reference(*inputs, mask, **options).float()
    assert gate.error(right) <= gate.limit("full")
    for other in (
        {**options, "rest": {"drop": "mean", "mean": "taylor", "taylor": "drop"}[rest]},
        {**options, "order": None if ordered else per_head_order(CASE, CPU)},
    ):
        wrong = sparse_attention_reference(*inputs, mask, **other)
        assert gate.error(wrong) > 10 * gate.limit("full")


@pytest.mark.parametrize("stride", [1, 4])
def test_mass_on_sampled_rows_is_the_reference(stride):
    inputs, rows = qkv(), torch.tensor([0, 2, 4])
    if stride == 1:
        truth = block_mass_reference(*inputs[:2], block=BLOCK)[0]
    else:
        truth = antidiagonal_scores_reference(*inputs[:2], block=BLOCK, stride=stride)
    found = mass_rows(inputs, BLOCK, stride, rows, torch.float64)
    torch.testing.assert_close(found, truth[:, :, rows])


class TestLimit:
    def naive(self, inputs, mask, dtype):
        rows = sampled(301, 16)
        truth = attention_rows(inputs, rows, mask, torch.float64)
        return relative_error(attention_rows(inputs, rows, mask, dtype), truth)

    @pytest.mark.parametrize(
        ("dtype", "precision", "naive"),
        [
            (torch.float32, "full", torch.float32),
            (torch.float32, "half", torch.bfloat16),
            (torch.float16, "half", torch.float16),
            (torch.bfloat16, "full", torch.bfloat16),
        ],
    )
    def test_it_is_twice_the_naive_error_in_the_precision_allowed(self, dtype, precision, naive):
        inputs, mask = qkv(dtype=dtype), mask_of()
        limit = attention_gate(inputs, mask, 16).limit(precision)
        assert limit == 2 * self.naive(inputs, mask, naive) + 1e-5

    @pytest.mark.parametrize("precision", STATED)
    def test_for_eight_bits_it_is_stated(self, precision):
        inputs = qkv(dtype=torch.bfloat16)
        limit = attention_gate(inputs, mask_of(), 16).limit(precision)
        assert limit == STATED[precision] > 2 * self.naive(inputs, mask_of(), torch.bfloat16)


class TestError:
    def test_of_the_truth_it_is_nothing(self):
        inputs, mask = qkv(), mask_of()
        gate = attention_gate(inputs, mask, 16)
        assert gate.error(sparse_attention_reference(*inputs, mask)) < 1e-12

    @pytest.mark.parametrize("head", range(3))
    def test_a_wrong_head_shows(self, head):
        inputs, mask = qkv(), mask_of()
        gate = attention_gate(inputs, mask, 16)
        result = sparse_attention_reference(*inputs, mask)
        result[1, head] *= 1.01
        assert gate.error(result) > gate.limit("full")

    def test_a_wrong_last_row_shows(self):
        inputs, mask = qkv(), mask_of()
        gate = attention_gate(inputs, mask, 1)
        result = sparse_attention_reference(*inputs, mask)
        result[:, :, -1] = 0.0
        assert gate.error(result) == 1.0

    def test_nan_is_no_small_error(self):
        inputs, mask = qkv(), mask_of()
        result = sparse_attention_reference(*inputs, mask).fill_(torch.nan)
        assert math.isnan(attention_gate(inputs, mask, 16).error(result))
