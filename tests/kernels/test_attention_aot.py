"""The Triton kernel compiles for every supported GPU without spilling, on a machine without one."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from accel.kernels.tiles import SHARED_BYTES

ROOT = Path(__file__).parents[2]
FULL_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA"}
INT8_CORE = {80: "IMMA", 89: "IMMA", 90: "IGMMA"}
FP8_CORE = {89: "QMMA", 90: "QGMMA"}
SPECIALIZED = [128, 64, 4, 3, True, False, True]
# two programs of 128 registers on a multiprocessor that spill a little are up to 1.4 times as fast
# on an H200 as one of 170 that spills nothing, and fp8 in tiles of 64 keys 1.4 times as fast as of
# 32; the version of Triton decides how little
BOUNDED_STACK_BYTES, FP8_STACK_BYTES = 256, 64
TWO_PROGRAMS = [128, 64, 8, 2, True, False, False, 128]


def variant(arch, dim=128, **changes):
    """A call at its most demanding: a ragged end, and what ``changes`` say."""
    plain = {
        "arch": arch,
        "block": (128, 64),
        "dtype": "bf16",
        "dim": dim,
        "ordered": False,
        "rest": "drop",
        "ragged": True,
        "lengths": False,
        "arithmetic": "full",
        "tiles": None,
    }
    return plain | changes


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


def check(one: dict) -> None:
    """Spills and shared memory within bounds, and the units that the variant is written for."""
    assert "error" not in one, one
    arch, way, opcodes = one["arch"], one["arithmetic"], set(one["opcodes"])
    bounded = one["tiles"][7] > 0
    spills = BOUNDED_STACK_BYTES if bounded else FP8_STACK_BYTES if way == "fp8" else 0
    assert one["local"] == 0, f"spills: {one}"
    assert one["stack"] <= spills, f"spills: {one}"
    assert one["shared"] <= SHARED_BYTES[arch], f"too much shared memory: {one}"
    # full fp32 precision is none of a tensor core
    full = one["dtype"] != "fp32" and (way != "fp8" or one["rest"] != "drop")
    # fewer than 64 queries are too few for the instructions of sm_90
    units = 89 if arch == 90 and one["tiles"][0] < 64 else arch
    assert (FULL_CORE[units] in opcodes) == full, f"16-bit tensor core or not: {one}"
    assert (INT8_CORE[units] in opcodes) == (way != "full"), f"int8 tensor core or not: {one}"
    if units == arch:
        assert (FP8_CORE.get(arch) in opcodes) == (way == "fp8"), f"fp8 tensor core or not: {one}"
    tma, _, specialized, _ = one["tiles"][4:]
    assert ("UTMALDG" in opcodes) == tma, f"memory accelerator or not: {one}"
    assert ("USETMAXREG" in opcodes) == specialized, f"specialized warps or not: {one}"


VARIANTS = [
    variant(90),
    variant(90, rest="taylor", lengths=True),
    variant(90, 64, ordered=True, rest="mean"),
    variant(90, tiles=SPECIALIZED),
    variant(90, tiles=[128, 64, 8, 3, True, True]),
    variant(90, tiles=TWO_PROGRAMS, lengths=True),
    variant(90, arithmetic="int8"),
    variant(90, arithmetic="fp8", rest="taylor", ordered=True, lengths=True),
    variant(89, 72, dtype="fp16", lengths=True),
    variant(89, arithmetic="fp8"),
    variant(80, ordered=True, rest="taylor", lengths=True),
    variant(80, 64, ragged=False),
    variant(80, arithmetic="int8", rest="mean"),
    variant(80, 256, dtype="fp32"),
]


def test_compiles_without_spills():
    variants = compile_variants(VARIANTS)
    assert len(variants) == len(VARIANTS)
    for one in variants:
        check(one)


def test_what_goes_before_compiles_without_spills():
    wanted = [
        {"kernel": kernel, "arch": arch, "block": 64, "dtype": "bf16", "dim": dim}
        for kernel, arch, dim in (
            ("means", 80, 72),
            ("keys", 90, 128),
            ("tops", 80, 128),
            ("values", 89, 72),
            ("values", 90, 128),
            ("slopes", 80, 128),
            ("slopes", 90, 256),
        )
    ]
    for one in compile_variants(wanted):
        assert "error" not in one, one
        assert one["stack"] == one["local"] == 0, f"spills: {one}"
        assert one["shared"] <= SHARED_BYTES[one["arch"]], f"too much shared memory: {one}"


# every kind of call in the table and behind it
CALLS = {  # dim, arithmetic, rest, ordered
    "bf16": list(product((64, 128, 256), ("full",), ("drop", "mean", "taylor"), (False, True))),
    "fp16": list(product((36, 72, 96), ("full",), ("drop", "taylor"), (False, True))),
    # taylor in fp32 on head dims above 128 spills: unrolled products without a tensor core
    "fp32": list(product((64, 128), ("full",), ("drop", "taylor"), (False, True)))
    + list(product((256,), ("full",), ("drop", "mean"), (False, True))),
    "int8": list(product((64, 72, 128, 256), ("int8",), ("drop", "taylor"), (False, True))),
    "fp8": list(product((64, 72, 128, 256), ("fp8",), ("drop", "taylor"), (False, True))),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "arch"),
    # without fp8 a GPU computes int8
    [(kind, arch) for kind, arch in product(CALLS, FULL_CORE) if kind != "fp8" or arch in FP8_CORE],
)
def test_compiles_without_spills_every_call(kind, arch):
    wanted = [
        variant(arch, dim, arithmetic=way, rest=rest, ordered=ordered, lengths=lengths)
        | {"dtype": kind if kind in ("fp16", "fp32") else "bf16"}
        for (dim, way, rest, ordered), lengths in product(CALLS[kind], (False, True))
    ]
    variants = compile_variants(wanted)
    assert len(variants) == len(wanted)
    for one in variants:
        check(one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (128, 32), (64, 48)], ids=str)
def test_compiles_without_spills_in_every_block(block):
    wanted = [
        variant(arch, dim, block=block, ordered=ordered, rest=rest)
        for arch, dim, ordered, rest in product(
            sorted(FULL_CORE), (64, 128), (False, True), ("drop", "taylor")
        )
    ]
    for one in compile_variants(wanted):
        check(one)
