"""Block mass: exact against the reference, streamed, with and without a known LSE."""

import pytest
import torch
from attention_cases import Case
from paths import take

from accel.kernels import block_mass as module
from accel.kernels.block_mass import block_mass as operation
from accel.kernels.reference import block_mass_reference

CASES = [
    Case(2, 6, 2, 1, 1, 16, (16, 16), id="one-token"),
    Case(3, 4, 2, 63, 111, 40, (32, 16), padded=True, id="cross-padded"),
    Case(3, 2, 1, 90, 90, 72, (64, 32), orders=2, padded=True, id="orders-padded"),
    Case(1, 2, 1, 150, 150, 128, (128, 64), orders=1, id="order-shared"),
    Case(1, 4, 2, 130, 63, 16, (48, 24), id="odd-blocks"),
]


@pytest.fixture(params=["native", "torch", "torch in chunks", "triton"])
def block_mass(request, monkeypatch):
    """Block mass, in every way it is computed."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(module, "CHUNK_LOGITS", 1)
    path = take(request.param, monkeypatch)
    return lambda q, k, **options: path.run(operation, q, k, **options)


def assert_same(got, truth):
    for x, y in zip(got, truth, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=2e-5)


def test_the_default_device_does_not_matter(block_mass, generator):
    q, k, _ = Case(2, 2, 1, 50, 50, 16, (16, 32)).tensors(generator)
    expected = block_mass(q, k, block=(16, 32))
    with torch.device("meta"):
        found = block_mass(q, k, block=(16, 32))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# flat rows and sharp ones
@pytest.mark.parametrize(
    ("case", "size"),
    [
        *zip(CASES, [1.0, 40.0, 1.0, 40.0, 1.0], strict=True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in zip(CASES, [40.0, 1.0, 40.0, 1.0, 40.0], strict=True)
        ),
    ],
    ids=lambda x: getattr(x, "id", x),
)
def test_matches_reference(block_mass, case, size, generator):
    q, k, _ = case.tensors(generator)
    options = case.options(generator) | {"block": case.block}
    truth = block_mass_reference(q * size, k, **options)
    mass, lse = block_mass(q * size, k, **options)
    assert_same((mass, lse), truth)
    again, same = block_mass(q * size, k, lse=lse, **options)
    torch.testing.assert_close(again, mass, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(same, lse)


def test_rows_sum_to_the_valid_queries(block_mass, generator):
    case = Case(2, 4, 2, 111, 111, 16, (32, 16), orders=4)
    q, k, _ = case.tensors(generator)
    order = case.options(generator)["order"]
    mass, _ = block_mass(q, k, block=case.block, order=order, kv_length=70)
    valid = torch.nn.functional.pad((order < 70).float(), (0, 17)).view(4, 4, 32).sum(2)
    torch.testing.assert_close(mass.sum(3), valid.expand(2, -1, -1))


def test_low_precision_inputs_are_computed_in_fp32(block_mass, generator):
    case = Case(1, 2, 1, 63, 111, 40, (32, 16))
    q, k, _ = case.tensors(generator, torch.bfloat16)
    assert_same(block_mass(q, k, block=case.block), block_mass_reference(q, k, block=case.block))


# numpy, which interprets the kernel, remarks on a maximum over NaN
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_padding_may_hold_anything(block_mass, generator):
    case = Case(1, 2, 1, 63, 63, 16, (32, 16))
    q, k, _ = case.tensors(generator)
    clean = block_mass(q, k, block=case.block, kv_length=40)[0]
    q[:, :, 40:] = k[:, :, 40:] = torch.nan
    torch.testing.assert_close(block_mass(q, k, block=case.block, kv_length=40)[0], clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (0, 16)}, "two positive sizes"),
        ({"block": (32, 16), "kv_length": 112}, "0..111"),
        ({"block": (32, 16), "order": torch.arange(63)}, "as many keys as queries"),
    ],
)
def test_refuses(block_mass, options, message, generator):
    q, k, _ = Case(1, 2, 1, 63, 111, 16, (32, 16)).tensors(generator)
    with pytest.raises(ValueError, match=message):
        block_mass(q, k, **options)
