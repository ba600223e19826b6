"""Random attention problems and the tolerance they are judged by."""

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from math import ceil

import numpy
import torch

from accel.kernels import native
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference


@dataclass(frozen=True)
class Backend:
    """A backend of ``sparse_attention`` and the device its tensors live on."""

    name: str
    device: str


def compiler_missing() -> str | None:
    """Why the C++ kernels cannot be built here, or None; a build that fails is no excuse."""
    return None if native._compiler() else "no C++ compiler"


@cache
def interpreter_missing() -> str | None:
    """Why Triton kernels cannot be interpreted here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    release = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if release < (3, 7) and tuple(int(x) for x in numpy.__version__.split(".")[:2]) >= (2, 4):
        return f"the interpreter of triton {triton.__version__} fails with numpy >= 2.4"
    if not triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET was not 1 when triton was imported (a GPU runs the real kernel)"
    return None


@dataclass(frozen=True)
class Case:
    """The sizes of one problem; they differ pairwise, so that no axis passes for another."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    kv_tokens: int
    dim: int
    block: tuple[int, int]
    keep: float = 0.5
    mask_batch: int = 1
    orders: int = 0  # 0: natural; 1: one for all heads; heads: one each
    padded: bool = False
    id: str = field(default="", compare=False)

    def tensors(self, generator: torch.Generator, dtype=torch.float32):
        """q, k, v."""
        shapes = [(self.heads, self.tokens), *[(self.kv_heads, self.kv_tokens)] * 2]
        return [
            torch.randn(self.batch, heads, tokens, self.dim, generator=generator).to(dtype)
            for heads, tokens in shapes
        ]

    def dense_keep(self, generator: torch.Generator) -> torch.Tensor:
        blocks = (ceil(self.tokens / self.block[0]), ceil(self.kv_tokens / self.block[1]))
        return torch.rand(self.mask_batch, self.heads, *blocks, generator=generator) < self.keep

    def mask(self, keep: torch.Tensor) -> BlockMask:
        return BlockMask.from_dense(
            keep, block=self.block, q_length=self.tokens, kv_length=self.kv_tokens
        )

    def options(self, generator: torch.Generator) -> dict:
        """order and kv_length, as far as the case has them."""
        options = {}
        if self.orders:
            permutations = [
                torch.randperm(self.tokens, generator=generator) for _ in range(self.orders)
            ]
            options["order"] = permutations[0] if self.orders == 1 else torch.stack(permutations)
        if self.padded:
            # from no key at all in the first batch element to all in the last
            steps = torch.arange(self.batch) * self.kv_tokens // max(1, self.batch - 1)
            options["kv_length"] = steps if self.batch > 1 else self.kv_tokens * 2 // 3
        return options


def run(backend: Backend, q, k, v, mask: BlockMask, **options):
    """``sparse_attention`` on the backend's device; out and LSE back on the CPU."""
    options = {
        name: value.to(backend.device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    q, k, v = (x.to(backend.device) for x in (q, k, v))
    out, lse = sparse_attention(
        q, k, v, mask.to(backend.device), return_lse=True, backend=backend.name, **options
    )
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    return out.cpu(), lse.cpu()


def check(backend: Backend, q, k, v, mask: BlockMask, **options):
    """Asserts that the backend is at most twice as far from float64 as the naive computation."""
    got = run(backend, q, k, v, mask, **options)
    truth = sparse_attention_reference(q, k, v, mask, return_lse=True, **options)
    naive = sparse_attention_reference(q, k, v, mask, return_lse=True, dtype=q.dtype, **options)
    for name, x, base, exact in zip(("out", "lse"), got, naive, truth, strict=True):
        finite = exact.isfinite()
        torch.testing.assert_close(
            x[~finite].double(), exact[~finite], msg=f"{name}: empty rows differ"
        )
        assert x.isfinite().eq(finite).all(), f"{name} has NaN or infinity"
        error, allowed = ((y.double() - exact)[finite].abs() for y in (x, base))
        limit = 2 * (allowed.max().item() if allowed.numel() else 0) + 1e-5
        assert not error.numel() or error.max() <= limit, f"{name}: {error.max():.2e} > {limit:.2e}"
    return got
