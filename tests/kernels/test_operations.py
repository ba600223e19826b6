"""The operations around attention are opaque to a compiler: they compile, export, have fakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# importing an operation registers it
import accel.kernels.antidiagonal
import accel.kernels.block_mass
import accel.kernels.column_sums
import accel.kernels.merge
import accel.kernels.permute
import accel.kernels.pooled_scores  # noqa: F401

ORDER = torch.arange(39).flip(0)
LENGTHS = torch.tensor([39, 20, 0], dtype=torch.int32)
NAMES = ["antidiagonal_scores", "block_mass", "column_sums", "merge", "permute", "pooled_scores"]


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
