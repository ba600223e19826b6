"""The kernels around attention compile for every supported GPU without spilling, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA"}
ROOT = Path(__file__).parents[2]
ARCHS = 3
# operation: the kernels it launches, and whether they have matrix products
KERNELS = {
    "block_mass": ["row_lse_kernel", "block_mass_kernel"],
    "column_sums": ["column_sums_kernel"],
    "antidiagonal": ["antidiagonal_kernel"],
    "pooled_scores": ["block_moments_kernel"] * 2,
    "merge": ["merge_kernel"],
    "permute": ["permute_kernel"],
    "window_attention": ["window_kernel"],
}
PRODUCTS = {"row_lse_kernel", "block_mass_kernel", "column_sums_kernel", "antidiagonal_kernel"}
PRODUCTS |= {"window_kernel"}


def variant(operation, dtype="bfloat16", dim=128, ordered=True, block=(128, 64)) -> dict:
    names = ("operation", "dtype", "dim", "ordered", "block")
    return dict(zip(names, (operation, dtype, dim, ordered, block), strict=True))


def check(variants: list[dict]) -> None:
    """Compiles the variants in a process of its own and looks at what came of them."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, Path(__file__).with_name("compile_launches.py")]
    done = subprocess.run(
        [*command, json.dumps(variants)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [
        name for one in variants for _ in range(ARCHS) for name in KERNELS[one["operation"]]
    ]
    assert [one["kernel"] for one in found] == expected
    for one in found:
        arch = one["arch"]
        # ptxas may set two words aside in front of a loop to fit more programs
        spare = 16 if one["kernel"] in {"window_kernel"} or one["kernel"] not in PRODUCTS else 0
        assert one["local"] == 0, f"spills: {one}"
        assert one["stack"] <= spare, f"spills: {one}"
        assert one["shared"] <= SHARED_BYTES[arch], f"too much shared memory: {one}"
        if one["kernel"] in PRODUCTS:
            # full fp32 precision is none of a tensor core
            core = TENSOR_CORE[arch] in one["opcodes"]
            assert core == (one["dtype"] != "float32"), f"tensor core or not: {one}"


def test_compiles_without_spills():
    check([variant(operation) for operation in KERNELS])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operation", KERNELS)
def test_compiles_without_spills_every_variant(operation):
    check(
        [
            *(
                variant(operation, dim=dim, ordered=ordered, block=block)
                for dim in (64, 128)
                for ordered in (False, True)
                for block in [(64, 64), (128, 128), (256, 512), (48, 24)]
            ),
            variant(operation, dim=256),
            variant(operation, "float16", dim=72),  # strides that 16 does not divide
            variant(operation, "float16", dim=96, ordered=False),
            variant(operation, "float32", dim=64),
            variant(operation, "float32", dim=128),
            variant(operation, "float32", dim=256),
        ]
    )
