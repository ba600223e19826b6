"""Antidiagonal scores: against float64 cell by cell, streamed, with ragged cells."""

import pytest
import torch
from attention_cases import Case
from paths import take

from accel.kernels import antidiagonal as module
from accel.kernels.antidiagonal import antidiagonal_scores as operation
from accel.kernels.estimator_reference import antidiagonal_scores_reference

CASES = [
    (Case(2, 6, 2, 1, 1, 16, (16, 8), id="one-token"), 8),
    (Case(3, 4, 2, 110, 110, 72, (32, 16), orders=4, padded=True, id="orders-padded"), 4),
    (Case(2, 2, 1, 150, 150, 40, (48, 24), orders=1, id="odd-blocks"), 8),
    (Case(1, 4, 2, 63, 63, 96, (16, 16), padded=True, id="cells-are-blocks"), 16),
    (Case(1, 2, 1, 90, 90, 16, (9, 6), id="odd-stride"), 3),
    (Case(1, 1, 1, 150, 150, 8, (70, 140), padded=True, id="blocks-of-several-tiles"), 2),
]


@pytest.fixture(params=["torch", "torch in chunks", "triton"])
def antidiagonal_scores(request, monkeypatch):
    """Antidiagonal scores, in every way they are computed."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(module, "CHUNK_LOGITS", 500)
    path = take(request.param, monkeypatch)
    return lambda q, k, **options: path.run(operation, q, k, **options)


@pytest.mark.parametrize(("case", "stride"), CASES, ids=[case.id for case, _ in CASES])
def test_matches_reference(antidiagonal_scores, case, stride, generator):
    q, k, _ = case.tensors(generator)
    q = q * 3
    options = case.options(generator) | {"block": case.block, "stride": stride}
    truth = antidiagonal_scores_reference(q, k, **options)
    found = antidiagonal_scores(q, k, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_rows_sum_to_the_valid_queries(antidiagonal_scores, generator):
    q, k, _ = Case(2, 4, 2, 60, 60, 16, (16, 8)).tensors(generator)
    scores = antidiagonal_scores(q, k, block=(16, 8), stride=8, kv_length=torch.tensor([21, 50]))
    valid = torch.tensor([[16, 5, 0, 0], [16, 16, 16, 2]]) / 8
    torch.testing.assert_close(scores.sum(3), valid[:, None].expand(2, 4, 4))


def test_more_keys_than_queries(antidiagonal_scores, generator):
    """Then keys alone are padding, and every query counts."""
    q, k, _ = Case(2, 4, 2, 21, 60, 16, (16, 8)).tensors(generator)
    scores = antidiagonal_scores(q, k, block=(16, 8), stride=4, kv_length=30)
    torch.testing.assert_close(scores.sum(3), torch.tensor([4.0, 5 / 4]).expand(2, 4, 2))
    assert (scores[..., 4:] == 0).all()


def test_low_precision_inputs_are_computed_in_fp32(antidiagonal_scores, generator):
    q, k, _ = Case(1, 2, 1, 63, 63, 40, (32, 16)).tensors(generator, torch.bfloat16)
    truth = antidiagonal_scores_reference(q, k, block=(32, 16), stride=8)
    found = antidiagonal_scores(q, k, block=(32, 16), stride=8)
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_padding_may_hold_anything(antidiagonal_scores, generator):
    q, k, _ = Case(2, 2, 1, 63, 63, 16, (32, 16)).tensors(generator)
    options = {"block": (32, 16), "stride": 8, "kv_length": torch.tensor([40, 0])}
    clean = antidiagonal_scores(q, k, **options)
    for x in (q, k):
        x[0, :, 40:] = x[1] = torch.nan
    torch.testing.assert_close(antidiagonal_scores(q, k, **options), clean)
    assert (clean[1] == 0).all()


def test_strided_inputs(antidiagonal_scores, generator):
    q, k, _ = Case(2, 4, 2, 33, 33, 16, (16, 8)).tensors(generator)
    expected = antidiagonal_scores(q, k, block=(16, 8), stride=4)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.testing.assert_close(antidiagonal_scores(q, k, block=(16, 8), stride=4), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (32, 20), "stride": 8}, "not a multiple of the stride 8"),
        ({"block": (32, 16), "stride": 0}, "stride 0"),
        ({"block": (32, 16), "kv_length": 64}, "0..63"),
    ],
)
def test_refuses(options, message, generator):
    q, k, _ = Case(1, 2, 1, 63, 63, 16, (32, 16)).tensors(generator)
    with pytest.raises(ValueError, match=message):
        operation(q, k, **options)
    with pytest.raises(NotImplementedError, match="no_grad"):
        operation(q.requires_grad_(), k, block=(32, 16))
