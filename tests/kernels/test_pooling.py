"""Stand-ins of whole blocks: torch's and Triton's are one."""

import pytest
import torch
from attention_cases import Case, interpreter_missing

pytest.importorskip("triton")

from accel.kernels import pooling, pooling_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Case(3, 2, 1, 111, 111, 72, (64, 24), padded=True, id="padded"),
    Case(1, 2, 2, 70, 70, 20, (64, 2), orders=2, padded=True, id="orders-padded"),
    Case(2, 2, 2, 150, 150, 96, (64, 100), orders=1, id="order-shared"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "for-8-bits"])
def test_triton_is_torch(case, changed, generator):
    if DEVICE == "cpu" and (reason := interpreter_missing()):
        pytest.skip(reason)
    _, k, v = (x.to(DEVICE) for x in case.tensors(generator))
    given = case.options(generator)
    options = {"block": case.block[1]}
    if case.orders:
        options["order"] = given["order"].reshape(-1, case.tokens).to(DEVICE)
    if case.padded:
        lengths = torch.as_tensor(given["kv_length"]).expand(case.batch)
        options["lengths"] = lengths.to(DEVICE, torch.int32)
        for b, length in enumerate(lengths.tolist()):
            k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
    stands_in = ~case.dense_keep(generator).all(2).to(DEVICE)
    k_mean, v_mean, log_count = pooling.pool_blocks(k, v, **options)
    slopes = pooling.block_slopes(k, v, stands_in, **options)
    changes = {}
    if changed:
        size = (case.batch, k_mean.shape[1], case.dim)
        shift = torch.randn(size, generator=generator).to(DEVICE)
        unit = torch.rand(size, generator=generator).to(DEVICE) + 0.5
        k_mean, v_mean = k_mean - shift[:, :, None], v_mean / unit[:, :, None]
        unit_of_head = unit.repeat_interleave(case.heads // unit.shape[1], 1)
        slopes = slopes / unit_of_head[:, :, None, None]
        changes = {"shift": shift, "unit": unit}
    found = pooling_triton.pool_blocks(k, v, **options, **changes)
    for x, y in zip(found, (k_mean, v_mean, log_count), strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    changes.pop("shift", None)
    found = pooling_triton.block_slopes(k, v, stands_in, **options, **changes)
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, slopes, atol=2e-6, rtol=1e-5)
