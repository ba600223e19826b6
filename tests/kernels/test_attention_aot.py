"""The Triton kernel compiles for every supported GPU without spilling, on a machine without one."""

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


def variant(block=(128, 64), dtype="bf16", dim=128, order=False, mean=False, lengths=False):
    names = ("block", "dtype", "dim", "order", "mean", "lengths")
    return dict(zip(names, (block, dtype, dim, order, mean, lengths), strict=True))


def compile_variants(variants) -> list[dict]:
    command = [sys.executable, Path(__file__).with_name("compile_ahead.py")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, json.dumps(variants)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(variants: list[dict]) -> None:
    for one in variants:
        arch = one["arch"]
        assert one["stack"] == one["local"] == 0, f"spills: {one}"
        assert one["shared"] <= SHARED_BYTES[arch], f"too much shared memory: {one}"
        # full fp32 precision is none of a tensor core
        core = TENSOR_CORE[arch] in one["opcodes"]
        assert core == (one["dtype"] != "fp32"), f"tensor core or not: {one}"


VARIANTS = [
    *(variant(dim=dim, order=on, mean=on) for dim in (64, 128) for on in (False, True)),
    variant(order=True, mean=True, lengths=True),
    variant(dtype="fp16", dim=72, lengths=True),  # strides that 16 does not divide
    variant(dtype="fp32", dim=256),
]


def test_compiles_without_spills():
    variants = compile_variants(VARIANTS)
    assert len(variants) == 3 * len(VARIANTS)
    check(variants)


@pytest.mark.slow
def test_compiles_without_spills_every_variant():
    wanted = [
        variant(block=block, dim=dim, order=order, mean=mean)
        for block in [(64, 64), (128, 64), (64, 128), (128, 128)]
        for dim in (64, 128)
        for order in (False, True)
        for mean in (False, True)
    ]
    variants = compile_variants(wanted)
    assert len(variants) == 3 * len(wanted)
    check(variants)
