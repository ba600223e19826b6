"""The first-order stand-in: what it is exact for, how its error falls, what it must not feel."""

import pytest
import torch
from attention_cases import Backend, Case, check, interpreter_missing, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.kernels.arguments import RESTS
from accel.kernels.pooling import TAYLOR_GROUP
from accel.kernels.reference import sparse_attention_reference

CASES = [
    Case(3, 6, 2, 63, 111, 40, (32, 16), mask_batch=3, padded=True, id="cross-padded"),
    Case(1, 6, 2, 111, 111, 72, (64, 32), orders=6, padded=True, id="orders-padded"),
    Case(1, 2, 1, 70, 70, 24, (48, 2), orders=1, keep=0.3, id="two-groups"),
]


@pytest.fixture(
    params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module"
)
def backend(request) -> Backend:
    if request.param == "cpu":
        return Backend("cpu", "cpu")
    if request.param == "cuda":
        return Backend("triton", "cuda")
    if reason := interpreter_missing():
        pytest.skip(reason)
    return Backend("triton", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_reference(backend, case, generator):
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    rest = [RESTS[-1 - h % 3] for h in range(case.heads)]
    check(backend, q, k, v, mask, rest=rest, **case.options(generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, dtype, generator):
    case = Case(1, 2, 1, 111, 111, 40, (64, 16), orders=2, padded=True)
    q, k, v = case.tensors(generator, dtype)
    check(
        backend,
        q,
        k,
        v,
        case.mask(case.dense_keep(generator)),
        rest="taylor",
        **case.options(generator),
    )


def test_every_block_kept_is_drop(backend, generator):
    case = Case(2, 2, 1, 63, 111, 16, (32, 16), padded=True)
    q, k, v = case.tensors(generator)
    mask = case.mask(torch.ones_like(case.dense_keep(generator)))
    options = case.options(generator)
    for x, y in zip(
        run(backend, q, k, v, mask, rest="taylor", **options),
        run(backend, q, k, v, mask, **options),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("padded", [False, True])
def test_exact_where_the_keys_of_a_block_are_equal(backend, padded, generator):
    """Their values may differ: without a spread of keys there is nothing to turn."""
    case = Case(2, 2, 2, 63, 111, 16, (32, 16), padded=padded)
    q, k, v = case.tensors(generator)
    k = k[:, :, ::16].repeat_interleave(16, 2)[:, :, :111]
    keep, options = case.dense_keep(generator), case.options(generator)
    out, lse = run(backend, q, k, v, case.mask(keep), rest="taylor", **options)
    dense = run(backend, q, k, v, case.mask(torch.ones_like(keep)), **options)
    torch.testing.assert_close(out, dense[0], atol=4e-6, rtol=2e-5)
    torch.testing.assert_close(lse, dense[1], atol=4e-6, rtol=2e-5)


def test_the_error_falls_with_the_square_of_the_spread(generator):
    """One block is left out, so that its group's slope is its own; the mean errs to first order.

    Values of mean 0: what is left of second order in the denominator, which has no slope, is then
    of third order in the result.
    """
    case = Case(1, 2, 1, 16, 64, 24, (16, 16))
    q, k, v = case.tensors(generator)
    v -= v.unflatten(2, (4, 16)).mean(3).repeat_interleave(16, 2)
    keep = torch.ones_like(case.dense_keep(generator))
    keep[..., 2] = False
    centre = k.unflatten(2, (4, 16)).mean(3).repeat_interleave(16, 2)
    errors = {rest: [] for rest in ("mean", "taylor")}
    for spread in (0.2, 0.1, 0.05):
        keys = centre + spread * (k - centre)
        full = case.mask(torch.ones_like(keep))
        exact = sparse_attention_reference(q, keys, v, full)
        for rest, found in errors.items():
            out = sparse_attention_reference(q, keys, v, case.mask(keep), rest=rest)
            found.append((out - exact).norm().item())
    for rest, order in (("mean", 1), ("taylor", 2)):
        falls = [a / b for a, b in zip(errors[rest], errors[rest][1:], strict=False)]
        assert falls == pytest.approx([2**order] * 2, rel=0.15), rest
    assert errors["taylor"][-1] < 0.1 * errors["mean"][-1]


def test_the_lse_is_that_of_mean(backend, generator):
    case = Case(1, 2, 1, 63, 200, 40, (32, 32))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    mean = run(backend, q, k, v, mask, rest="mean")
    taylor = run(backend, q, k, v, mask, rest="taylor")
    torch.testing.assert_close(taylor[1], mean[1])
    assert (taylor[0] - mean[0]).abs().max() > 0.01


def test_blocks_that_every_row_keeps_do_not_turn_the_slope(backend, generator):
    case = Case(2, 2, 1, 63, 111, 16, (32, 16))
    q, k, v = case.tensors(generator)
    keep = case.dense_keep(generator)
    keep[..., 3], keep[..., 4], keep[:, :, 0, 5] = True, False, True
    q[..., 0] = 0  # so that the kept keys' own logits stay as they are
    clean = run(backend, q, k, v, case.mask(keep), rest="taylor")
    k[:, :, 48:64, 0] = torch.linspace(-1e3, 1e3, 16)
    spoilt = run(backend, q, k, v, case.mask(keep), rest="taylor")
    for x, y in zip(spoilt, clean, strict=True):
        torch.testing.assert_close(x, y)


def test_padding_may_hold_anything(backend, generator):
    case = Case(2, 2, 1, 63, 111, 16, (32, 16))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    clean = run(backend, q, k, v, mask, rest="taylor", kv_length=50)
    k[:, :, 50:], v[:, :, 50:] = torch.nan, torch.inf
    for x, y in zip(run(backend, q, k, v, mask, rest="taylor", kv_length=50), clean, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)


def test_the_reference_is_the_formula(generator):
    """Token by token, on more blocks than one group."""
    case = Case(1, 2, 1, 5, 79, 6, (4, 2), keep=0.6)
    s = 6**-0.5
    q, k, v = (x.double() for x in case.tensors(generator))
    keep = case.dense_keep(generator)[0]
    assert keep.shape[2] > TAYLOR_GROUP
    out, lse = sparse_attention_reference(
        q, k, v, case.mask(keep), rest="taylor", kv_length=77, return_lse=True
    )
    blocks = [range(2 * j, min(2 * j + 2, 77)) for j in range(39)]  # block 39 holds padding only
    mean = [k[0, 0, list(b)].mean(0) for b in blocks]
    slope = [
        sum(torch.outer(k[0, 0, n] - mean[j], v[0, 0, n]) for n in b) for j, b in enumerate(blocks)
    ]
    for h in range(2):
        for t in range(5):
            top, bottom = torch.zeros(6).double(), torch.tensor(0.0).double()
            for j, b in enumerate(blocks):
                if keep[h, t // 4, j]:
                    weights = [(s * q[0, h, t] @ k[0, 0, n]).exp() for n in b]
                    top += sum(w * v[0, 0, n] for w, n in zip(weights, b, strict=True))
                    bottom += sum(weights)
                    continue
                group = range(j // 32 * 32, min(39, j // 32 * 32 + 32))
                taken = [slope[i] for i in group if not keep[h, :, i].all()]
                weight = (s * q[0, h, t] @ mean[j]).exp()
                top += weight * (len(b) * v[0, 0, list(b)].mean(0))
                top += weight * s * q[0, h, t] @ (sum(taken) / len(taken))
                bottom += len(b) * weight
            torch.testing.assert_close(out[0, h, t], top / bottom)
            torch.testing.assert_close(lse[0, h, t], bottom.log())


@settings(
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_shape_and_mask(data):
    tokens = data.draw(st.integers(1, 90), label="tokens")
    heads = data.draw(st.sampled_from([1, 2, 4]), label="heads")
    batch = data.draw(st.integers(1, 3), label="batch")
    orders = data.draw(st.sampled_from([0, 1, heads]), label="orders")
    case = Case(
        batch=batch,
        heads=heads,
        kv_heads=data.draw(st.sampled_from([1, heads]), label="kv_heads"),
        tokens=tokens,
        kv_tokens=tokens if orders else data.draw(st.integers(1, 90), label="kv_tokens"),
        dim=data.draw(st.sampled_from([1, 8, 20]), label="dim"),
        block=data.draw(st.sampled_from([(16, 1), (4, 2), (24, 16)]), label="block"),
        keep=data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]), label="keep"),
        mask_batch=data.draw(st.sampled_from([1, batch]), label="mask_batch"),
        orders=orders,
        padded=data.draw(st.booleans(), label="padded"),
    )
    rest = data.draw(st.lists(st.sampled_from(RESTS), min_size=heads, max_size=heads))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    check(Backend("cpu", "cpu"), q, k, v, mask, rest=rest, **case.options(generator))
