"""Column sums: against float64, with and without a known LSE, weights and padding."""

import pytest
import torch
from attention_cases import Case
from paths import take

from accel.kernels import column_sums as module
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.column_sums import column_sums as operation
from accel.kernels.estimator_reference import column_sums_reference

BLOCK = (16, 16)  # of no meaning here
CASES = [
    Case(2, 6, 2, 1, 1, 16, BLOCK, id="one-token"),
    Case(2, 4, 2, 1, 150, 64, BLOCK, id="class-token"),
    Case(3, 4, 2, 63, 80, 40, BLOCK, padded=True, id="cross-padded"),
    Case(3, 2, 1, 90, 90, 72, BLOCK, padded=True, id="padded"),
    Case(1, 2, 1, 140, 140, 96, BLOCK, id="wide"),
]


@pytest.fixture(params=["native", "torch", "torch in chunks", "triton"])
def column_sums(request, monkeypatch):
    """Column sums, in every way they are computed."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(module, "CHUNK_LOGITS", 1000)
    path = take(request.param, monkeypatch)
    return lambda q, k, **options: path.run(operation, q, k, **options)


def weights_of(case, generator):
    """Signed weights, a third of the rows counting nothing."""
    weights = torch.randn(case.batch, case.tokens, generator=generator)
    return weights * (torch.rand(weights.shape, generator=generator) > 1 / 3)


@pytest.mark.parametrize(
    ("case", "weighted"),
    [(case, False) for case in CASES[:4]] + [(case, True) for case in CASES[2:]],
    ids=lambda x: getattr(x, "id", "weighted" if x else "all"),
)
def test_matches_reference(column_sums, case, weighted, generator):
    q, k, _ = case.tensors(generator)
    q = q * 4
    options = case.options(generator) | {"scale": 0.3}
    if weighted:
        options["weights"] = weights_of(case, generator)
    truth = column_sums_reference(q, k, **options)
    found = column_sums(q, k, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_padding_of_one_batch_element_is_nothing_to_another(column_sums, generator):
    q, k = (torch.randn(2, 1, 8, 16, generator=generator) for _ in range(2))
    lse = torch.randn(2, 1, 8, generator=generator)
    lengths = torch.tensor([4, 8])
    q[0, :, 4:] = k[0, :, 4:] = torch.nan
    lse[0, :, 4:] = torch.nan  # as attention gives it where padding holds NaN
    truth = column_sums_reference(q, k, lse=lse, kv_length=lengths)
    found = column_sums(q, k, lse=lse, kv_length=lengths)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.id)
def test_a_known_lse_is_read(column_sums, case, generator):
    q, k, _ = case.tensors(generator)
    options = case.options(generator)
    lse = torch.randn(q.shape[:3], generator=generator) + 5
    lse[0, 1, 3:9] = -torch.inf  # rows that a sparse call left empty
    truth = column_sums_reference(q, k, lse=lse, **options)
    found = column_sums(q, k, lse=lse, **options)
    torch.testing.assert_close(found.double(), truth, atol=2e-5, rtol=2e-5)


def test_stands_beside_attention(column_sums, generator):
    q, k, v = Case(2, 4, 2, 63, 111, 24, BLOCK).tensors(generator)
    mask = BlockMask.full(4, block=BLOCK, q_length=63, kv_length=111)
    _, lse = sparse_attention(q, k, v, mask, return_lse=True, backend="cpu")
    sums = column_sums(q, k, lse=lse)
    torch.testing.assert_close(sums, column_sums(q, k))
    torch.testing.assert_close(sums.sum(2), torch.full((2, 4), 63.0))


def test_low_precision_inputs_lose_nothing_more(column_sums, generator):
    q, k, _ = Case(1, 2, 1, 63, 111, 40, BLOCK).tensors(generator, torch.bfloat16)
    truth = column_sums_reference(q, k)
    torch.testing.assert_close(column_sums(q, k).double(), truth, atol=2e-4, rtol=2e-4)


# numpy, which interprets the kernel, remarks on a maximum over NaN
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_counts_nothing_may_hold_anything(column_sums, generator):
    q, k, _ = Case(2, 2, 1, 50, 50, 16, BLOCK).tensors(generator)
    weights = torch.ones(2, 50)
    weights[:, 7] = 0
    options = {"weights": weights, "kv_length": torch.tensor([40, 20])}
    clean = column_sums(q, k, **options)
    for x in (q, k):
        x[0, :, 40:] = x[1, :, 20:] = torch.nan
    q[:, :, 7] = torch.nan
    found = column_sums(q, k, **options)
    torch.testing.assert_close(found, clean)
    assert (found[0, :, 40:] == 0).all()
    assert (found[1, :, 20:] == 0).all()


def test_strided_inputs(column_sums, generator):
    q, k, _ = Case(2, 4, 2, 33, 47, 16, BLOCK).tensors(generator)
    expected = column_sums(q, k)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    torch.testing.assert_close(column_sums(q, k), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lse": torch.zeros(1, 2, 111)}, "lse"),
        ({"weights": torch.zeros(63, 1)}, "weights"),
        ({"kv_length": 112}, "0..111"),
    ],
)
def test_refuses(options, message, generator):
    q, k, _ = Case(1, 2, 1, 63, 111, 16, BLOCK).tensors(generator)
    # where shapes are checked, a TypeError comes first
    with pytest.raises((ValueError, TypeError), match=message):
        operation(q, k, **options)
    with pytest.raises(NotImplementedError, match="no_grad"):
        operation(q.requires_grad_(), k)
