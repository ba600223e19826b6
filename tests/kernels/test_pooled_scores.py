"""Pooled scores: against float64 block by block, with and without the bias of values."""

import pytest
import torch
from attention_cases import Case
from paths import take

from accel.kernels import pooled_scores as module
from accel.kernels.estimator_reference import pooled_scores_reference
from accel.kernels.pooled_scores import pooled_scores as operation

CASES = [
    Case(2, 6, 2, 1, 1, 16, (16, 16), id="one-token"),
    Case(3, 4, 2, 63, 111, 40, (32, 16), padded=True, id="cross-padded"),
    Case(3, 4, 2, 111, 111, 72, (64, 32), orders=4, padded=True, id="orders-padded"),
    Case(2, 2, 1, 150, 150, 96, (64, 128), orders=1, id="order-shared"),
    Case(1, 4, 2, 130, 63, 16, (48, 24), id="odd-blocks"),
]


@pytest.fixture(params=["torch", "torch in chunks", "triton"])
def pooled_scores(request, monkeypatch):
    """Pooled scores, in every way they are computed."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    path = take(request.param, monkeypatch)
    return lambda *tensors, **options: path.run(operation, *tensors, **options)


@pytest.mark.parametrize("value_bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_reference(pooled_scores, case, value_bias, generator):
    tensors = case.tensors(generator)
    options = case.options(generator) | {"block": case.block, "value_bias": value_bias}
    truth = pooled_scores_reference(*tensors, **options)
    found = pooled_scores(*tensors, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_low_precision_inputs_are_computed_in_fp32(pooled_scores, generator):
    tensors = Case(1, 2, 1, 63, 111, 40, (32, 16)).tensors(generator, torch.bfloat16)
    truth = pooled_scores_reference(*tensors, block=(32, 16))
    found = pooled_scores(*tensors, block=(32, 16))
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_padding_may_hold_anything(pooled_scores, generator):
    tensors = Case(2, 2, 1, 63, 63, 16, (32, 16)).tensors(generator)
    options = {"block": (32, 16), "kv_length": torch.tensor([40, 0])}
    clean = pooled_scores(*tensors, **options)
    for x in tensors:
        x[0, :, 40:] = x[1] = torch.nan
    torch.testing.assert_close(pooled_scores(*tensors, **options), clean)
    assert clean[0, ..., 3:].isneginf().all()
    assert clean[1].isneginf().all()


def test_inputs_stay_as_they_are(pooled_scores, generator):
    tensors = Case(2, 2, 1, 64, 64, 16, (32, 16)).tensors(generator)
    copies = [x.clone() for x in tensors]
    pooled_scores(*tensors, block=(32, 16), kv_length=40)
    for x, y in zip(tensors, copies, strict=True):
        assert torch.equal(x, y)


def test_strided_inputs(pooled_scores, generator):
    tensors = Case(2, 4, 2, 33, 47, 16, (16, 8)).tensors(generator)
    expected = pooled_scores(*tensors, block=(16, 8))
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    torch.testing.assert_close(pooled_scores(*tensors, block=(16, 8)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (0, 16)}, "two positive sizes"),
        ({"block": (32, 16), "kv_length": 112}, "0..111"),
        ({"block": (32, 16), "order": torch.arange(63)}, "as many keys as queries"),
    ],
)
def test_refuses(options, message, generator):
    q, k, v = Case(1, 2, 1, 63, 111, 16, (32, 16)).tensors(generator)
    with pytest.raises(ValueError, match=message):
        operation(q, k, v, **options)
    with pytest.raises(NotImplementedError, match="no_grad"):
        operation(q, k, v.requires_grad_(), block=(32, 16))
