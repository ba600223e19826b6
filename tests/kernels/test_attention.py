"""One contract, four executions: torch and C++ on the CPU, Triton interpreted, and on a GPU."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Backend, Case, check, compiler_missing, interpreter_missing, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.kernels import attention_cpu, native
from accel.kernels.arguments import PRECISIONS
from accel.kernels.attention import resolve_backend, resolve_precision, sparse_attention
from accel.kernels.attention_cpu import has_bf16
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference

CASES = [
    Case(2, 6, 2, 1, 1, 16, (16, 16), id="one-token"),
    Case(3, 6, 2, 63, 111, 40, (32, 16), mask_batch=3, padded=True, id="cross-padded"),
    Case(1, 6, 2, 111, 111, 72, (64, 32), orders=6, padded=True, id="orders-padded"),
    Case(2, 2, 1, 200, 200, 128, (128, 64), orders=1, id="order-shared"),
    Case(1, 4, 2, 130, 63, 16, (48, 24), keep=0.3, id="odd-blocks"),
    Case(1, 2, 2, 63, 200, 200, (16, 64), keep=0.8, id="wide-head"),
]


@pytest.fixture(
    params=["cpu", "native", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
    scope="module",
)
def backend(request) -> Backend:
    if request.param == "cpu":
        return Backend("cpu", "cpu")
    if request.param == "native":
        if reason := compiler_missing():
            pytest.skip(reason)
        return Backend("native", "cpu")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return Backend("triton", "cuda")
    if reason := interpreter_missing():
        pytest.skip(reason)
    return Backend("triton", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_reference(backend, case, generator):
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    rest = ["drop", "mean"] * (case.heads // 2)
    check(backend, q, k, v, mask, rest=rest, **case.options(generator))


def test_the_default_device_does_not_matter(backend, generator):
    """What a path makes on its way lies beside q; no tensor can mix with those on meta."""
    if backend.device != "cpu" or backend.name == "triton":
        pytest.skip("the launch of a Triton kernel is what torch makes of it")
    case = CASES[2]
    q, k, v = case.tensors(generator)
    keep, options = case.dense_keep(generator), case.options(generator)
    expected = run(backend, q, k, v, case.mask(keep), rest="mean", **options)
    with torch.device("meta"):
        found = run(backend, q, k, v, case.mask(keep), rest="mean", **options)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rest", ["drop", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(backend, dtype, rest, generator):
    case = Case(1, 2, 1, 111, 111, 40, (64, 32), orders=2, padded=True)
    q, k, v = case.tensors(generator, dtype)
    mask = case.mask(case.dense_keep(generator))
    check(backend, q, k, v, mask, rest=rest, **case.options(generator))


@pytest.mark.parametrize("rest", ["drop", "mean"])
def test_dense_sparse_and_skipped_heads_in_one_launch(backend, rest, generator):
    case = Case(2, 6, 2, 111, 63, 40, (32, 32), mask_batch=2)
    q, k, v = case.tensors(generator)
    keep = case.dense_keep(generator)
    keep[:, 0], keep[:, 1], keep[1, 2], keep[0, 3] = True, False, True, False
    keep[:, 4, 1] = False
    out, lse = check(backend, q, k, v, case.mask(keep), rest=rest)
    if rest == "drop":
        assert (out[:, 1] == 0).all()
        assert (lse[:, 1] == -torch.inf).all()
        assert (out[:, 4, 32:64] == 0).all()


def test_full_mask_is_dense_attention(backend, generator):
    case = Case(2, 6, 2, 63, 111, 40, (32, 64))
    q, k, v = case.tensors(generator)
    mask = BlockMask.full(6, block=case.block, q_length=63, kv_length=111)
    out, lse = run(backend, q, k, v, mask)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
    logits = q @ k.repeat_interleave(3, 1).mT / 40**0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=2e-6, rtol=1e-5)


def test_order_is_a_permuted_call(backend, generator):
    case = Case(2, 2, 2, 111, 111, 16, (32, 16), orders=2)
    q, k, v = case.tensors(generator)
    mask, order = case.mask(case.dense_keep(generator)), case.options(generator)["order"]
    index = order[None, :, :, None].expand(2, -1, -1, 16)
    moved, moved_lse = run(backend, *(x.gather(2, index) for x in (q, k, v)), mask)
    out, lse = run(backend, q, k, v, mask, order=order)
    torch.testing.assert_close(out.gather(2, index), moved)
    torch.testing.assert_close(lse.gather(2, index[..., 0]), moved_lse)


def test_disjoint_key_sets_merge_by_lse(backend, generator):
    case = Case(1, 2, 1, 63, 200, 40, (32, 32))
    q, k, v = case.tensors(generator)
    keep = case.dense_keep(generator)
    parts = [run(backend, q, k, v, case.mask(part)) for part in (keep, ~keep)]
    lse = torch.stack([part[1] for part in parts])
    weights = lse.softmax(0)[..., None]
    merged = (weights * torch.stack([part[0] for part in parts])).sum(0)
    dense, dense_lse = run(backend, q, k, v, case.mask(torch.ones_like(keep)))
    torch.testing.assert_close(merged, dense, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.logsumexp(0), dense_lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_mean_is_exact_where_blocks_are_constant(backend, padded, generator):
    """Also in the ragged last block, and where padding cuts a block."""
    case = Case(2, 2, 2, 63, 111, 16, (32, 16), padded=padded)
    q, k, v = case.tensors(generator)
    k, v = (x[:, :, ::16].repeat_interleave(16, 2)[:, :, :111] for x in (k, v))
    keep, options = case.dense_keep(generator), case.options(generator)
    out, lse = run(backend, q, k, v, case.mask(keep), rest="mean", **options)
    dense = run(backend, q, k, v, case.mask(torch.ones_like(keep)), **options)
    torch.testing.assert_close(out, dense[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, dense[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rest", ["drop", "mean"])
@pytest.mark.parametrize("size", [12.0, 60.0])
def test_large_logits(backend, rest, size, generator):
    """Logits far beyond the range of exp, next to small ones in another head."""
    case = Case(1, 2, 2, 63, 130, 40, (32, 32), padded=True)
    q, k, v = case.tensors(generator)
    q, k = (x * torch.tensor([1.0, size])[:, None, None] for x in (q, k))
    mask = case.mask(case.dense_keep(generator))
    check(backend, q, k, v, mask, rest=rest, **case.options(generator))


@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_logits_far_from_zero(backend, offset, generator):
    """A constant on all logits changes the LSE only."""
    case = Case(1, 2, 2, 63, 63, 16, (32, 16), keep=0.4)
    q, k, v = case.tensors(generator)
    q[..., 0], k[..., 0] = 4.0, offset
    check(backend, q, k, v, case.mask(case.dense_keep(generator)))


def test_padding_may_hold_anything(backend, generator):
    case = Case(2, 2, 1, 63, 111, 16, (32, 16), padded=True)
    q, k, v = case.tensors(generator)
    mask, options = case.mask(case.dense_keep(generator)), {"kv_length": 50}
    clean = run(backend, q, k, v, mask, rest="mean", **options)
    k[:, :, 50:], v[:, :, 50:] = torch.nan, torch.inf
    for x, y in zip(run(backend, q, k, v, mask, rest="mean", **options), clean, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)


def test_any_strides(backend, generator):
    case = Case(2, 4, 2, 63, 111, 16, (32, 16))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    plain = run(backend, q, k, v, mask)
    tokens_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([k, k + 1], -1)[..., 0]
    dim_first = v.mT.contiguous().mT
    strided = run(backend, tokens_first, every_other, dim_first, mask)
    for x, y in zip(strided, plain, strict=True):
        torch.testing.assert_close(x, y)


def test_scale(backend, generator):
    case = Case(1, 2, 1, 63, 63, 16, (32, 16))
    q, k, v = case.tensors(generator)
    check(backend, q, k, v, case.mask(case.dense_keep(generator)), rest="mean", scale=0.7)


@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.parametrize("name", ["cpu", "native"])
@given(data=st.data())
def test_any_shape_and_mask(name, data):
    """On the CPU paths, which are fast enough for many examples."""
    if name == "native" and (reason := compiler_missing()):
        pytest.skip(reason)
    tokens = data.draw(st.integers(1, 90), label="tokens")
    orders = data.draw(st.sampled_from(["natural", "shared", "each"]), label="orders")
    heads = data.draw(st.sampled_from([1, 2, 4]), label="heads")
    batch = data.draw(st.integers(1, 3), label="batch")
    sizes = st.sampled_from([4, 16, 24, 64])
    case = Case(
        batch=batch,
        heads=heads,
        kv_heads=data.draw(st.sampled_from([1, heads]), label="kv_heads"),
        tokens=tokens,
        kv_tokens=data.draw(st.integers(1, 90)) if orders == "natural" else tokens,
        dim=data.draw(st.sampled_from([1, 8, 20, 48]), label="dim"),
        block=(data.draw(sizes, label="q_block"), data.draw(sizes, label="kv_block")),
        keep=data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]), label="keep"),
        mask_batch=data.draw(st.sampled_from([1, batch]), label="mask_batch"),
        orders={"natural": 0, "shared": 1, "each": heads}[orders],
        padded=data.draw(st.booleans(), label="padded"),
    )
    rest = data.draw(st.lists(st.sampled_from(["drop", "mean"]), min_size=heads, max_size=heads))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    check(Backend(name, "cpu"), q, k, v, mask, rest=rest, **case.options(generator))


def test_reference_backend_and_auto(generator):
    case = Case(1, 2, 1, 63, 63, 16, (32, 16), orders=2, padded=True)
    q, k, v = case.tensors(generator, torch.bfloat16)
    mask, options = case.mask(case.dense_keep(generator)), case.options(generator)
    out, lse = sparse_attention(q, k, v, mask, backend="reference", return_lse=True, **options)
    truth, truth_lse = sparse_attention_reference(q, k, v, mask, return_lse=True, **options)
    torch.testing.assert_close(out, truth.to(torch.bfloat16))
    torch.testing.assert_close(lse, truth_lse.float())
    auto = sparse_attention(q, k, v, mask, **options)
    resolved = resolve_backend("auto", q.device)
    assert resolved in ("native", "cpu")
    torch.testing.assert_close(
        auto, sparse_attention(q, k, v, mask, backend=resolved, **options), atol=0, rtol=0
    )


OPTIONS = ("rest", "kv_length", "order", "precision")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": {"q_length": 60}}, "60 queries and 63 keys"),
        ({"mask": {"heads": 3}}, "must have 4 heads"),
        ({"rest": "newton"}, "drop, mean, taylor, got 'newton'"),
        ({"precision": "int4"}, "full, half, int8, fp8, got 'int4'"),
        ({"rest": ["drop", "mean"]}, r"one per head \(4\), got 2"),
        ({"kv_length": 64}, r"0..63 .*got 64"),
        ({"kv_length": torch.tensor([64])}, r"0..63 .*got 64"),
        ({"order": torch.zeros(3, 63, dtype=torch.int64)}, r"order must be \[63\] or \[4, 63\]"),
        ({"kv_heads": 3}, "must divide the heads of q"),
        ({"dim": 257}, "at most 256, got 257"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses(change, message, generator):
    size = {"heads": 4, "q_length": 63} | change.get("mask", {})
    mask = BlockMask.full(size["heads"], block=(32, 16), q_length=size["q_length"], kv_length=63)
    case = Case(1, 4, change.get("kv_heads", 2), 63, 63, change.get("dim", 16), (32, 16))
    q, k, v = case.tensors(generator, change.get("dtype", torch.float32))
    options = {name: change[name] for name in OPTIONS if name in change}
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, mask, **options)


def test_an_order_needs_square_attention(generator):
    case = Case(1, 2, 2, 63, 60, 16, (32, 16))
    mask = case.mask(case.dense_keep(generator))
    with pytest.raises(ValueError, match="as many keys as queries, got 60 and 63"):
        sparse_attention(*case.tensors(generator), mask, order=torch.arange(63))


@pytest.mark.parametrize("rest", ["drop", "mean", "taylor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_with_products_in_bf16(dtype, rest, generator, monkeypatch):
    """As on processors with instructions for it; elsewhere they are emulated, and slow. fp16 has
    finer digits than bf16, and is computed in fp32.
    """
    monkeypatch.setattr(attention_cpu, "has_bf16", lambda _: True)
    case = Case(2, 4, 2, 111, 111, 40, (64, 32), orders=4, padded=True)
    q, k, v = case.tensors(generator, dtype)
    mask, options = case.mask(case.dense_keep(generator)), case.options(generator)
    found, _ = run(Backend("cpu", "cpu"), q, k, v, mask, rest=rest, **options)
    truth = sparse_attention_reference(q, k, v, mask, rest=rest, **options)
    error = (found.double() - truth).norm() / truth.norm()
    assert 1e-3 < error < 8e-3 if dtype == torch.bfloat16 else error < 1e-3
    exact = q.float(), k.float(), v.float()
    found, _ = run(Backend("cpu", "cpu"), *exact, mask, rest=rest, **options)
    assert (found.double() - truth).norm() / truth.norm() < 1e-6


@pytest.mark.parametrize(
    ("backend", "dtype", "expected"),
    [
        ("reference", torch.float32, "full"),
        ("native", torch.float32, "half" if native.has_integers() else "full"),
        ("native", torch.bfloat16, "full"),
        ("cpu", torch.float32, "half" if has_bf16(torch.device("cpu")) else "full"),
        ("cpu", torch.float16, "full"),
    ],
)
def test_what_is_computed_is_told_and_not_what_is_allowed(backend, dtype, expected):
    told = {resolve_precision(p, backend, dtype, torch.device("cpu")) for p in PRECISIONS[1:]}
    assert told == {expected}
    assert resolve_precision("full", backend, dtype, torch.device("cpu")) == "full"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("arch", "told"), [(80, ["half", "int8", "int8"]), (90, ["half", "int8", "fp8"])]
)
def test_what_a_gpu_computes_depends_on_what_it_has(arch, told, monkeypatch):
    from accel.kernels import attention_triton

    monkeypatch.setattr(attention_triton, "architecture", lambda device: arch)
    found = [
        resolve_precision(p, "triton", torch.float32, torch.device("cuda")) for p in PRECISIONS[1:]
    ]
    assert found == told
    assert resolve_precision("half", "triton", torch.float16, torch.device("cuda")) == "full"
