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


def compile_variants(blocks, switches) -> list[dict]:
    command = [sys.executable, Path(__file__).with_name("compile_ahead.py")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [*command, json.dumps([blocks, switches])], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(variants: list[dict]) -> None:
    for variant in variants:
        arch = variant["arch"]
        assert variant["stack"] == variant["local"] == 0, f"spills: {variant}"
        assert variant["shared"] <= SHARED_BYTES[arch], f"too much shared memory: {variant}"
        assert TENSOR_CORE[arch] in variant["opcodes"], f"no tensor core: {variant}"


def test_compiles_without_spills():
    variants = compile_variants([(128, 64)], [(False, False), (True, True)])
    assert len(variants) == 3 * 2 * 2
    check(variants)


@pytest.mark.slow
def test_compiles_without_spills_every_variant():
    blocks = [(64, 64), (128, 64), (64, 128), (128, 128)]
    switches = [(order, mean) for order in (False, True) for mean in (False, True)]
    variants = compile_variants(blocks, switches)
    assert len(variants) == 3 * 2 * len(blocks) * len(switches)
    check(variants)
