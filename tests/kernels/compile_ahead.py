"""Compiles the attention kernel without a GPU; prints what the compiler made of each variant.

Run in a process of its own: one that interprets Triton kernels cannot compile them. A variant names
what `tiles_key` asks for, a dtype, whether there are valid lengths, and tiles unless the chosen.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accel.kernels.attention_kernel import attention_kernel
from accel.kernels.pooling import TAYLOR_GROUP
from accel.kernels.pooling_triton import means_kernel, slopes_kernel
from accel.kernels.quantize import keys_kernel, tops_kernel, values_kernel
from accel.kernels.tiles import Tiles, choose_tiles, tiles_key

OPCODES = r"\b(HGMMA|HMMA|IGMMA|IMMA|QGMMA|QMMA|UTMALDG|USETMAXREG|LDGSTS)\b"
ELEMENT = "*element"  # stands for the dtype of q, k and v
POINTERS = {
    "p_q": ELEMENT,
    "p_k": ELEMENT,
    "p_v": ELEMENT,
    "p_out": ELEMENT,
    "p_lse": "*fp32",
    "p_counts": "*i32",
    "p_indices": "*i32",
    "p_longest": "*i32",
}
INT8 = {"p_k": "*i8", "p_k_scale": "*fp32", "p_k_shift": "*fp32"}
FP8 = INT8 | {"p_v": "*fp8e4nv", "p_v_scale": "*fp32"}
MEAN = {
    "p_k_mean": ELEMENT,
    "p_v_mean": ELEMENT,
    "p_log_count": "*fp32",
    "p_kept": "*u8",
    "p_rest": "*i8",
}
RESTS = {"drop": {}, "mean": MEAN, "taylor": MEAN | {"p_slopes": ELEMENT}}
ARITHMETIC = {"full": {}, "int8": INT8, "fp8": FP8}
# strides of whole tokens are multiples of the head dim
ALIGNED = {f"s_{x}_{axis}" for x in "qkv" for axis in ("batch", "head", "token")}


AROUND = {
    "means": (means_kernel, {"p_k_mean": ELEMENT, "p_v_mean": ELEMENT, "p_log_count": "*fp32"}, 4),
    "slopes": (slopes_kernel, {"p_stands_in": "*i1", "p_slopes": ELEMENT}, 8),
    "keys": (keys_kernel, {"p_out": "*i8", "p_scale": "*fp32", "p_shift": "*fp32"}, 4),
    "tops": (tops_kernel, {"p_tops": "*fp32"}, 4),
    "values": (values_kernel, {"p_out": "*fp8e4nv", "p_scale": "*fp32"}, 4),
}


def build(kernel: str = "attention", **variant):
    return build_around(kernel, **variant) if kernel in AROUND else build_attention(**variant)


def build_around(name: str, arch: int, block: int, dtype: str, dim: int):
    """What prepares the stand-ins and the 8-bit keys, with an order and valid lengths."""
    kernel, pointers, warps = AROUND[name]
    known = {"p_k": ELEMENT, "p_v": ELEMENT, "p_lengths": "*i32", "p_order": "*i64"} | pointers
    pointers = {x: kind for x, kind in known.items() if x in kernel.arg_names}
    power = max(16, triton.next_power_of_2(dim))
    constants = {"DIM": dim, "KV_BLOCK": block, "BN": min(64, block), "BD": power}
    constants |= {"GROUP": TAYLOR_GROUP, "BC": min(64, power), "UPCAST": False}
    pointers = {x: kind.replace("element", dtype) for x, kind in pointers.items()}
    return None, compiled(kernel, pointers, constants, ALIGNED, arch, num_warps=warps)


def build_attention(
    arch: int,
    block: list[int],
    dtype: str,
    dim: int,
    ordered: bool,
    rest: str,
    ragged: bool,
    lengths: bool,
    arithmetic: str,
    tiles: list | None,
):
    size = 4 if dtype == "fp32" else 2
    gather = ordered and arithmetic == "full" and arch != 90
    key = tiles_key(
        arch=arch,
        block=tuple(block),
        dim=dim,
        element_bytes=size,
        access="ordered" if gather else "plain" if dim * size % 16 == 0 else "unaligned",
        rest=rest,
        arithmetic=arithmetic,
    )
    chosen = Tiles(*tiles) if tiles else choose_tiles(key)
    constants = {
        "DIM": dim,
        "Q_BLOCK": block[0],
        "KV_BLOCK": block[1],
        "BM": chosen.queries,
        "BN": chosen.keys,
        "BT": TAYLOR_GROUP if rest == "taylor" else min(TAYLOR_GROUP, chosen.keys),
        "BD": key.dim,
        "GATHER": gather,
        "ALIGNED": dim * size % 16 == 0,
        "TMA": chosen.tma,
        "PERSISTENT": chosen.persistent,
        "SPECIALIZED": chosen.specialized,
        "RAGGED": ragged or lengths or block[1] % chosen.keys != 0,
        "UPCAST": False,
    }
    pointers = POINTERS | RESTS[rest] | ARITHMETIC[arithmetic]
    pointers |= {"p_lengths": "*i32"} if lengths else {}
    pointers |= {"p_order": "*i64"} if ordered else {}
    pointers = {x: kind.replace("element", dtype) for x, kind in pointers.items()}
    options = {
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "maxnreg": chosen.registers or None,
        "enable_fp_fusion": True,
    }
    return chosen, compiled(attention_kernel, pointers, constants, set(), arch, **options)


def compiled(kernel, pointers: dict, constants: dict, aligned: set, arch: int, **options):
    """Pointers that are not named are None; all else is a 32-bit number."""
    names = kernel.arg_names
    constants = {x: value for x, value in constants.items() if x in names}
    constants |= {x: None for x in names if x.startswith("p_") and x not in pointers}
    signature = {x: "constexpr" if x in constants else pointers.get(x, "i32") for x in names}
    signature |= {x: "fp32" for x in names if x == "scale_log2"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(names)
        if x in aligned or (x in pointers and x not in constants)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
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
        opcodes = sorted(set(re.findall(OPCODES, dump("--dump-sass"))))
    return {name.lower(): int(value) for name, value in usage.items()} | {"opcodes": opcodes}


if __name__ == "__main__":
    for variant in json.loads(sys.argv[1]):
        try:
            tiles, kernel = build(**variant)
        except Exception as error:  # the test that asked says which variant
            found = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        else:
            found = inspect(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
            found["tiles"] = tiles
        print(json.dumps(variant | found), flush=True)
