"""The operations around attention are opaque to a compiler: they compile, export, have fakes."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from accel.kernels import dispatch
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.block_mass import block_mass
from accel.kernels.column_sums import column_sums
from accel.kernels.merge import merge
from accel.kernels.permute import permute
from accel.kernels.pooled_scores import pooled_scores

ORDER = torch.arange(39).flip(0)
LENGTHS = torch.tensor([39, 20, 0], dtype=torch.int32)
NAMES = ["antidiagonal_scores", "block_mass", "column_sums", "merge", "permute", "pooled_scores"]
NAMES += ["sparse_attention"]  # of window attention


def test_compile_and_export_without_a_break():
    command = [sys.executable, Path(__file__).with_name("compile_operations.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"accel.{name}.default" for name in NAMES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_say_what_comes(dtype, generator):
    q, k, v = (torch.randn(3, n, 39, 16, generator=generator).to(dtype) for n in (4, 2, 2))
    lengths, order = LENGTHS, ORDER[None]
    lse = torch.randn(q.shape[:3])
    weights = torch.ones(3, 39)
    ops = torch.ops.accel
    calls = [
        (ops.block_mass, (q, k, [16, 8], 0.2, None, lengths, order)),
        (ops.block_mass, (q, k, [16, 8], 0.2, lse, None, None)),
        (ops.antidiagonal_scores, (q, k, [16, 8], 4, 0.2, lengths, order)),
        (ops.pooled_scores, (q, k, v, [16, 8], 0.2, lengths, order)),
        (ops.pooled_scores, (q, k, None, [16, 8], 0.2, None, None)),
        (ops.column_sums, (q, k, 0.2, None, weights, lengths)),
        (ops.column_sums, (q, k, 0.2, lse, None, None)),
        (ops.merge, ([q, q.mT.contiguous().mT], [lse, lse + 1])),
        (ops.permute, (order, [q, k.mT.contiguous().mT, lse[0].mT], -2)),
        (ops.permute, (torch.stack([ORDER] * 4), [q], -2)),
    ]
    checks = ("test_schema", "test_faketensor")
    for operation, values in calls:
        torch.library.opcheck(operation.default, values, test_utils=checks)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_launched_where_the_tensors_are(name, monkeypatch, generator):
    """On the second GPU too; there is none here, so what is asked of torch is looked at."""
    asked = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x) or device_of(x))
    q, k, v = (torch.randn(3, n, 39, 16, generator=generator) for n in (4, 2, 2))
    lse = torch.randn(q.shape[:3])
    mask = BlockMask.full(4, block=(16, 8), q_length=39, kv_length=39)
    stem = {"merge": "merge", "permute": "permute", "sparse_attention": "attention"}.get(name)
    if stem:  # on torch these need no device: a launch is what does
        pytest.importorskip("triton")
        found = [q.clone()] if name == "permute" else (q.clone(), lse.clone())
        module = import_module(f"accel.kernels.{stem}_triton")
        monkeypatch.setattr(dispatch, "runs_triton", lambda x: True)
        monkeypatch.setattr(module, "forward", lambda *_, **__: found)
    calls = {
        "antidiagonal_scores": lambda: antidiagonal_scores(q, k, block=(16, 8), stride=4),
        "block_mass": lambda: block_mass(q, k, block=(16, 8)),
        "column_sums": lambda: column_sums(q, k),
        "merge": lambda: merge([(q, lse)]),
        "permute": lambda: permute(ORDER, q),
        "pooled_scores": lambda: pooled_scores(q, k, v, block=(16, 8)),
        "sparse_attention": lambda: sparse_attention(q, k, v, mask, backend="triton"),
    }
    calls[name]()
    assert asked


def test_what_no_kernel_computes_is_refused(generator):
    q, k = (torch.randn(3, n, 39, 16, generator=generator).double() for n in (4, 2))
    for operation in (
        lambda: block_mass(q, k, block=(16, 8)),
        lambda: column_sums(q, k),
        lambda: antidiagonal_scores(q, k, block=(16, 8), stride=4),
        lambda: pooled_scores(q, k, k, block=(16, 8)),
    ):
        with pytest.raises(ValueError, match=r"float16 or bfloat16, got torch\.float64"):
            operation()
    with pytest.raises(ValueError, match="no axis -2; say which by dim="):
        permute(ORDER, torch.zeros(39))
