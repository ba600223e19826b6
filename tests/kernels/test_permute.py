"""Permutations: exact, for any dtype, width and axis, and there and back."""

import pytest
import torch
from paths import take

from accel.kernels.permute import permute as operation
from accel.kernels.permute import reordering

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.bool,
    torch.int64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@pytest.fixture(params=["torch", "triton"])
def permute(request, monkeypatch):
    """Permuting, in every way it is done."""
    path = take(request.param, monkeypatch)
    return lambda order, *tensors, **options: path.run(operation, order, *tensors, **options)


def filled(shape, dtype, generator):
    x = torch.randn(shape, generator=generator) * 3
    return x > 0 if dtype == torch.bool else x.to(dtype)


def assert_same_bits(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.is_contiguous()
    assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(permute, dtype, generator):
    order = torch.randperm(75, generator=generator)
    x = filled((2, 3, 75, 7), dtype, generator)
    (found,) = permute(order, x)
    assert_same_bits(found, torch.stack([x[:, :, i] for i in order], 2))


def test_queries_keys_values_and_tables_at_once(permute, generator):
    order = torch.randperm(130, generator=generator)
    shapes = [(3, 6, 130, 72), (3, 2, 130, 72), (3, 2, 130, 96), (130, 36), (1, 130, 1)]
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float16, torch.complex64, torch.int32]
    tensors = [filled(s, d, generator) for s, d in zip(shapes, dtypes, strict=True)]
    found = permute(order, *tensors)
    for x, y in zip(found, tensors, strict=True):
        assert_same_bits(x, y.index_select(-2, order))


def test_an_order_per_head(permute, generator):
    orders = torch.stack([torch.randperm(45, generator=generator) for _ in range(4)])
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 4, 45, 16), (4, 45, 5))]
    found = permute(orders, *tensors)
    for x, y in zip(found, tensors, strict=True):
        heads = [y.select(-3, h).index_select(-2, orders[h]) for h in range(4)]
        assert_same_bits(x, torch.stack(heads, -3))


def test_tokens_before_heads(permute, generator):
    order = torch.randperm(33, generator=generator)
    x = torch.randn(2, 33, 3, 8, generator=generator)
    table = torch.randn(1, 33, 1, 4, 2, generator=generator)
    for found, source in zip(permute(order, x, table, dim=1), (x, table), strict=True):
        assert_same_bits(found, source[:, order])
    (found,) = permute(order, x[0, :, 0, 0], dim=0)
    assert_same_bits(found, x[0, :, 0, 0][order])


def test_wide_rows(permute, generator):
    order = torch.randperm(5, generator=generator)
    x = torch.randn(2, 5, 5000, generator=generator)
    assert_same_bits(permute(order, x)[0], x[:, order])


def test_strided_inputs(permute, generator):
    orders = torch.stack([torch.randperm(29, generator=generator) for _ in range(3)])
    x = torch.randn(2, 29, 3, 8, generator=generator).transpose(1, 2)
    y = torch.randn(2, 3, 8, 29, generator=generator).mT
    for found, source in zip(permute(orders, x, y), (x, y), strict=True):
        heads = [source[:, h].index_select(1, orders[h]) for h in range(3)]
        assert_same_bits(found, torch.stack(heads, 1))


@pytest.mark.parametrize("heads", [0, 3])
def test_there_and_back(heads, generator):
    shape = (heads, 40) if heads else (40,)
    order = torch.rand(shape, generator=generator).argsort(-1)
    tensors = [torch.randn(2, 3, 40, width, generator=generator) for width in (8, 5)]
    apply, restore = reordering(order)
    there = apply(*tensors)
    assert not torch.equal(there[0], tensors[0])
    for x, y in zip(restore(*there), tensors, strict=True):
        assert_same_bits(x, y)


def test_nothing_to_permute():
    assert operation(torch.arange(3)) == ()


def test_refuses():
    x = torch.zeros(2, 3, 40, 8)
    for order in (torch.arange(39), torch.zeros(2, 40, dtype=torch.int64)):
        with pytest.raises(ValueError, match="fits no axis -2"):
            operation(order, x)
    with pytest.raises(ValueError, match="fits no axis"):
        operation(torch.zeros(3, 40, dtype=torch.int64), x, torch.zeros(40, 8))
    with pytest.raises(NotImplementedError, match="no_grad"):
        operation(torch.arange(40), x.requires_grad_())
