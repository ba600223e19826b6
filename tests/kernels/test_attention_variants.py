"""Every way the Triton kernel can run gives the one result: pointers, descriptors, turns, 8 bits.

In the interpreter programs run one after the other and there are no warps: what is checked is the
arithmetic and the addressing. That each way compiles is for test_attention_aot.py to check.
"""

import pytest
import torch
from attention_cases import Backend, Case, check, interpreter_missing, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from accel.kernels import attention_triton
from accel.kernels.arguments import RESTS
from accel.kernels.reference import sparse_attention_reference
from accel.kernels.tiles import Tiles, choose_tiles

BACKEND = Backend("triton", "cuda" if torch.cuda.is_available() else "cpu")
WAYS = {
    "pointers": Tiles(32, 32, 4, 2),
    "in turns": Tiles(64, 16, 4, 3, persistent=True),
    "descriptors": Tiles(64, 32, 8, 3, tma=True),
    "descriptors in turns": Tiles(32, 16, 4, 2, tma=True, persistent=True),
    "specialized": Tiles(128, 32, 4, 3, tma=True, specialized=True),
    "bounded registers": Tiles(64, 32, 8, 2, registers=128),
}
CASES = [
    Case(2, 3, 1, 1, 1, 16, (16, 16), id="one-token"),
    Case(3, 2, 1, 63, 111, 48, (32, 32), mask_batch=3, padded=True, id="cross-padded"),
    Case(1, 3, 1, 111, 111, 72, (64, 32), orders=3, padded=True, id="orders-padded"),
    Case(1, 3, 1, 200, 200, 96, (128, 64), orders=1, id="order-shared"),
    Case(1, 3, 3, 130, 63, 16, (48, 24), keep=0.4, id="odd-blocks"),
    Case(2, 2, 2, 63, 192, 200, (16, 64), keep=0.8, id="even-wide-head"),
    Case(2, 1, 1, 70, 90, 20, (32, 32), id="unaligned-head"),
]
# relative L2 of what 8 bits may cost, on normal data with an offset of 3 in the keys' channels
LIMITS = {"int8": 0.02, "fp8": 0.08}


@pytest.fixture(autouse=True)
def _can_run():
    if BACKEND.device == "cpu" and (reason := interpreter_missing()):
        pytest.skip(reason)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Takes these tiles wherever a call allows them."""
    tiles = WAYS[request.param]
    if tiles.tma and BACKEND.device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator")
    use(monkeypatch, tiles)
    return request.param


def use(monkeypatch, tiles: Tiles) -> None:
    def chosen(key, *, padded):
        if tiles.tma and key.access != "plain":
            return choose_tiles(key, padded=padded)
        alone = tiles.specialized and (padded or key.rest != "drop" or key.arithmetic != "full")
        return tiles._replace(specialized=tiles.specialized and not alone)

    monkeypatch.setattr(attention_triton, "choose_tiles", chosen)


def rests(case: Case) -> list[str]:
    return [RESTS[h % 3] for h in range(case.heads)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_reference(way, case, generator):
    q, k, v = case.tensors(generator, torch.float16)
    mask = case.mask(case.dense_keep(generator))
    rest = "drop" if way == "specialized" else rests(case)
    check(BACKEND, q, k, v, mask, rest=rest, **case.options(generator))


ORDERED = [case for case in CASES if case.orders]


@pytest.mark.parametrize("precision", ["full", "int8"])
@pytest.mark.parametrize("case", ORDERED, ids=lambda case: case.id)
def test_keys_are_gathered_where_no_descriptor_could_load_them(
    case, precision, generator, monkeypatch
):
    monkeypatch.setattr(attention_triton, "architecture", lambda device: 80)
    if precision == "int8":
        return check_8_bits(case, precision, torch.bfloat16, generator)
    seen = []

    def remembered(key, *, padded):
        seen.append(key)
        return choose_tiles(key, padded=padded)

    monkeypatch.setattr(attention_triton, "choose_tiles", remembered)
    q, k, v = case.tensors(generator, torch.float16)
    mask = case.mask(case.dense_keep(generator))
    check(BACKEND, q, k, v, mask, rest=rests(case), **case.options(generator))
    assert {key.access for key in seen} == {"ordered"}


@pytest.mark.parametrize(("kv_heads", "orders"), [(2, 1), (6, 6), (2, 6)])
def test_keys_are_copied_into_an_order(kv_heads, orders, generator):
    case = Case(2, 6, kv_heads, 130, 130, 40, (64, 32), orders=orders)
    q, k, v = (x.mT.contiguous().mT for x in case.tensors(generator, torch.float16))
    mask = case.mask(case.dense_keep(generator))
    check(BACKEND, q, k, v, mask, rest=rests(case), **case.options(generator))


def check_8_bits(case: Case, precision: str, dtype, generator) -> None:
    q, k, v = case.tensors(generator, dtype)
    k = (k + 3 * torch.randn(case.kv_heads, 1, case.dim, generator=generator)).to(dtype)
    mask, options = case.mask(case.dense_keep(generator)), case.options(generator)
    options |= {"rest": rests(case)}
    out, lse = run(BACKEND, q, k, v, mask, precision=precision, **options)
    exact, exact_lse = sparse_attention_reference(q, k, v, mask, return_lse=True, **options)
    finite = exact_lse.isfinite()
    assert lse.isfinite().eq(finite).all()
    assert (out[~finite] == 0).all()
    error = (out - exact).norm() / exact.norm()
    # not so exact that nothing was rounded to 8 bits, unless one key is all there is
    assert error < LIMITS[precision]
    assert error > 1e-4 or case.kv_tokens == 1
    # an error of the offset's size would show that the LSE lacks the keys' mean
    assert (lse - exact_lse)[finite].abs().max() < 0.1


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_8_bits(precision, case, generator, monkeypatch):
    """By descriptors, wherever a call allows it, and by pointers, every other case each way."""
    odd = CASES.index(case) % 2
    use(monkeypatch, WAYS["pointers" if odd else "descriptors"])
    check_8_bits(case, precision, torch.bfloat16 if odd else torch.float16, generator)


@pytest.mark.parametrize("precision", ["half", "int8", "fp8"])
def test_fp32_becomes_bf16_where_it_may(precision, generator):
    case = Case(1, 2, 1, 63, 111, 40, (32, 32))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    out, _ = run(BACKEND, q, k, v, mask, precision=precision, rest="mean")
    assert out.dtype == torch.float32
    exact = sparse_attention_reference(q, k, v, mask, rest="mean")
    error = (out - exact).norm() / exact.norm()
    assert 1e-4 < error < {"half": 5e-3, **LIMITS}[precision]
    full, _ = run(BACKEND, q, k, v, mask, rest="mean")
    assert (full - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(precision, scale, generator):
    case = Case(1, 2, 1, 63, 111, 32, (32, 32))
    q, k, v = case.tensors(generator, torch.float16)
    mask = case.mask(case.dense_keep(generator))
    options = {"scale": scale, "rest": "mean", "kv_length": 100}
    out, lse = run(BACKEND, q, k, v, mask, precision=precision, **options)
    exact, exact_lse = sparse_attention_reference(q, k, v, mask, return_lse=True, **options)
    assert (out - exact).norm() / exact.norm() < {"full": 1e-3, **LIMITS}[precision]
    torch.testing.assert_close(lse, exact_lse.float(), atol=0.05, rtol=0)


@pytest.mark.parametrize("precision", LIMITS)
def test_constant_and_padded_keys(precision, generator):
    """Blocks of zeros once their mean is out: no scale is 0, and padding stays out."""
    case = Case(2, 2, 1, 63, 111, 32, (32, 32))
    q, k, v = case.tensors(generator, torch.float16)
    k = k[:, :, :1].expand_as(k).clone()
    mask = case.mask(torch.ones_like(case.dense_keep(generator)))
    k[:, :, 70:], v[:, :, 70:] = torch.nan, torch.inf
    out, lse = run(BACKEND, q, k, v, mask, precision=precision, kv_length=70)
    expected = v[:, :, :70].float().mean(2, keepdim=True).expand(-1, 2, 63, -1)
    assert (out - expected).norm() / expected.norm() < LIMITS[precision]
    logits = (q.float() @ k[:, :, :1].float().mT)[..., 0] / 32**0.5
    torch.testing.assert_close(lse, logits + torch.tensor(70.0).log(), atol=2e-3, rtol=0)


def test_the_allocator_of_descriptors_is_nobody_elses(monkeypatch, generator):
    from triton.runtime import _allocation

    set_by = []
    monkeypatch.setattr(triton, "set_allocator", lambda x: set_by.append(x) or real(x))
    real = _allocation.set_allocator
    before = _allocation._allocator.get()
    case = Case(1, 2, 1, 63, 64, 32, (32, 32))
    use(monkeypatch, WAYS["descriptors"])
    run(BACKEND, *case.tensors(generator), case.mask(case.dense_keep(generator)))
    assert set_by == [attention_triton._workspace]
    assert _allocation._allocator.get() is before


def any_call(data, tiles: Tiles | None, monkeypatch) -> None:
    tokens = data.draw(st.integers(1, 150), label="tokens")
    heads = data.draw(st.sampled_from([1, 2, 3]), label="heads")
    batch = data.draw(st.integers(1, 3), label="batch")
    orders = data.draw(st.sampled_from([0, 1, heads]), label="orders")
    case = Case(
        batch=batch,
        heads=heads,
        kv_heads=data.draw(st.sampled_from([1, heads]), label="kv_heads"),
        tokens=tokens,
        kv_tokens=tokens if orders else data.draw(st.integers(1, 150), label="kv_tokens"),
        dim=data.draw(st.sampled_from([1, 20, 32, 64, 72]), label="dim"),
        block=data.draw(st.sampled_from([(16, 16), (64, 32), (24, 40), (128, 64)]), label="block"),
        keep=data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]), label="keep"),
        mask_batch=data.draw(st.sampled_from([1, batch]), label="mask_batch"),
        orders=orders,
        padded=data.draw(st.booleans(), label="padded"),
    )
    rest = data.draw(st.lists(st.sampled_from(RESTS), min_size=heads, max_size=heads))
    # the interpreter cuts bf16 off where it should round
    dtypes = [torch.float32, torch.float16, *[torch.bfloat16] * (BACKEND.device == "cuda")]
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    q, k, v = case.tensors(generator, dtype)
    mask = case.mask(case.dense_keep(generator))
    with monkeypatch.context() as patch:
        use(patch, tiles)
        check(BACKEND, q, k, v, mask, rest=rest, **case.options(generator))


HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=5, derandomize=True, suppress_health_check=HEALTH)
@given(data=st.data(), name=st.sampled_from(list(WAYS)))
def test_any_call(data, name, monkeypatch):
    any_call(data, WAYS[name], monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=150, derandomize=True, suppress_health_check=HEALTH)
@pytest.mark.parametrize("name", WAYS)
@given(data=st.data())
def test_any_call_many(data, name, monkeypatch):
    any_call(data, WAYS[name], monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=60, derandomize=True, suppress_health_check=HEALTH)
@pytest.mark.parametrize("precision", LIMITS)
@given(data=st.data())
def test_8_bits_many(data, precision):
    tokens = data.draw(st.integers(8, 150), label="tokens")
    orders = data.draw(st.sampled_from([0, 1, 2]), label="orders")
    case = Case(
        batch=2,
        heads=2,
        kv_heads=data.draw(st.sampled_from([1, 2]), label="kv_heads"),
        tokens=tokens,
        kv_tokens=tokens,
        dim=data.draw(st.sampled_from([20, 32, 72, 128]), label="dim"),
        block=data.draw(st.sampled_from([(16, 16), (64, 32), (24, 40)]), label="block"),
        orders=orders,
        padded=data.draw(st.booleans(), label="padded"),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    check_8_bits(case, precision, torch.float16, generator)
