"""Compiles what the launchers around attention launch, without a GPU; prints what came of it.

The launchers themselves run, on CPU tensors, under a driver that knows a GPU's name and no more:
types, strides and alignments are those of a real call. Run in a process of its own: one that
interprets Triton kernels cannot compile them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from accel.kernels import tiles_triton
from accel.kernels.antidiagonal import _cells
from accel.kernels.antidiagonal_triton import forward as antidiagonal
from accel.kernels.block_mass_triton import forward as block_mass
from accel.kernels.column_sums_triton import forward as column_sums
from accel.kernels.merge_triton import forward as merge
from accel.kernels.permute_triton import forward as permute
from accel.kernels.pooled_scores_triton import moments
from accel.kernels.window_attention_triton import forward as window_attention

BATCH, HEADS, KV_HEADS, TOKENS = 2, 4, 2, 1000
ARCHS = (80, 89, 90)


class NoDriver:
    """Names a target; every target is a device of its own, for the caches of the kernels."""

    arch = 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def call(operation: str, dtype: torch.dtype, dim: int, ordered: bool, block: tuple[int, int]):
    """Launch an operation, of which kernels are compiled only; ``ordered`` calls have padding."""
    q = torch.zeros(BATCH, HEADS, TOKENS, dim, dtype=dtype)
    k = torch.zeros(BATCH, KV_HEADS, TOKENS, dim, dtype=dtype)
    order = torch.arange(TOKENS)[None] if ordered else None
    lengths = torch.tensor([TOKENS, 700], dtype=torch.int32) if ordered else None
    scale = dim**-0.5
    if operation == "block_mass":
        block_mass(q, k, block=block, scale=scale, lse=None, lengths=lengths, order=order)
    elif operation == "column_sums":
        weights = torch.ones(BATCH, TOKENS)
        lse = torch.zeros(q.shape[:3])
        column_sums(q, k, scale=scale, lse=lse, weights=weights, lengths=lengths)
    elif operation == "antidiagonal":
        cells = (_cells(x, size, 8, lengths, order) for x, size in zip((q, k), block, strict=True))
        antidiagonal(q, k, *cells, per_block=(block[0] // 8, block[1] // 8), scale=scale)
    elif operation == "pooled_scores":
        moments(q, None, block=block[0], lengths=lengths, order=order)
        moments(k, k, block=block[1], lengths=lengths, order=order)
    elif operation == "merge":
        merge([q, q, q], [torch.zeros(q.shape[:3])] * 3)
    elif operation == "permute":
        permute(torch.arange(TOKENS)[None], [q, k, torch.zeros(TOKENS, dim // 2)], dim=-2)
    elif operation == "window_attention":
        # a window of as many tokens as a block has queries; masks where there is an order
        size = block[0]
        windows = torch.zeros(BATCH, 3, size, dtype=torch.int64)
        masks = torch.zeros(3, size, size, dtype=dtype) if ordered else None
        kind = torch.zeros(BATCH, 3, dtype=torch.int64) if ordered else None
        bias = torch.zeros(HEADS, size, size, dtype=dtype)
        window_attention(q, q, q, windows, bias=bias, masks=masks, kind=kind, scale=scale)
    else:
        raise ValueError(operation)


def compiled(arch: int, variant: dict) -> list[tuple[str, object]]:
    """Every kernel that the variant launches, by name."""
    found = []
    launch = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append((self.__name__, kernel))
        return kernel

    NoDriver.arch = arch
    triton.JITFunction.run = compile_only
    try:
        call(**variant)
    finally:
        triton.JITFunction.run = launch
    return found


def resources(cubin: bytes) -> dict:
    """Registers, stack, spills and matrix opcodes, as ``cuobjdump`` reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        texts = [
            subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True)
            for what in ("--dump-resource-usage", "--dump-sass")
        ]
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", texts[0].stdout))
    opcodes = sorted(set(re.findall(r"\b(HGMMA|HMMA|QGMMA|LDGSTS)\b", texts[1].stdout)))
    return {name.lower(): int(value) for name, value in usage.items()} | {"opcodes": opcodes}


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    tiles_triton.is_interpreted.__code__ = (lambda x: False).__code__
    for variant in json.loads(sys.argv[1]):
        options = variant | {
            "dtype": getattr(torch, variant["dtype"]),
            "block": tuple(variant["block"]),
        }
        for arch in ARCHS:
            for name, kernel in compiled(arch, options):
                used = resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
                print(json.dumps({"kernel": name, "arch": arch, **variant} | used), flush=True)
