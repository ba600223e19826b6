"""Compiles the attention kernel without a GPU; prints what the compiler made of each variant.

Run in a process of its own: one that interprets Triton kernels cannot compile them.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accel.kernels.attention_triton import attention_kernel, choose_tiles

ELEMENT = "*element"  # stands for the dtype of q, k and v
POINTERS = {
    "p_q": ELEMENT,
    "p_k": ELEMENT,
    "p_v": ELEMENT,
    "p_out": ELEMENT,
    "p_lse": "*fp32",
    "p_counts": "*i32",
    "p_indices": "*i32",
}
LENGTHS = {"p_lengths": "*i32"}
ORDER = {"p_order": "*i64"}
MEAN = {
    "p_k_mean": ELEMENT,
    "p_v_mean": ELEMENT,
    "p_log_count": "*fp32",
    "p_kept": "*u8",
    "p_pooled": "*i8",
}
# strides of whole tokens are multiples of the head dim
ALIGNED = {f"s_{x}_{axis}" for x in "qkv" for axis in ("batch", "head", "token")}


def build(
    arch: int, block: tuple[int, int], dtype: str, dim: int, order: bool, mean: bool, lengths: bool
):
    tiles = choose_tiles(block, dim, 4 if dtype == "fp32" else 2, arch=arch, ordered=order)
    constants = {
        "DIM": dim,
        "Q_BLOCK": block[0],
        "KV_BLOCK": block[1],
        "BM": tiles.queries,
        "BN": tiles.keys,
        "BD": tiles.dim,
        "UPCAST": False,
    }
    pointers = POINTERS | (ORDER if order else {}) | (MEAN if mean else {})
    pointers |= LENGTHS if lengths else {}
    signature, attributes = {}, {}
    for i, name in enumerate(attention_kernel.arg_names):
        if name in pointers:
            signature[name] = pointers[name].replace("element", dtype)
        elif name.startswith("p_") or name in constants:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
        if name in pointers or (name in ALIGNED and dim % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(attention_kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(cubin: bytes) -> dict:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(what: str) -> str:
            command = [tools / "cuobjdump", what, path]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        opcodes = sorted(set(re.findall(r"\b(HGMMA|HMMA)\b", dump("--dump-sass"))))
    return {name.lower(): int(value) for name, value in usage.items()} | {"opcodes": opcodes}


if __name__ == "__main__":
    for arch, variant in product((80, 89, 90), json.loads(sys.argv[1])):
        kernel = build(arch, **{**variant, "block": tuple(variant["block"])})
        used = inspect(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
        print(json.dumps({"arch": arch, **variant} | used), flush=True)
