"""What about a call no sparse kernel can do, or no layout explains: in words, or None."""

from collections import Counter

import torch
from jaxtyping import Bool
from torch import Tensor

from accel.geometry import Geometry, Site
from accel.kernels.arguments import DTYPES, MAX_DIM
from accel.layout import Layout
from accel.layouts import valid_keys
from accel.plan import Plan
from accel.run_state import Run

__all__ = ["GRADIENTS", "misfit", "missed", "refusal", "too_short", "unexplained"]

GRADIENTS = "the call needs gradients, which the sparse kernels do not give"


def missed(geometry: Geometry, seen: Counter[str]) -> str | None:
    """Which of the sites a call that is the check of a model did not meet once.

    Or as often as every other: a model may call its sites for each sample.
    """
    counts = {s.name: seen[s.name] for s in geometry.sites}
    if len(set(counts.values())) == 1 and min(counts.values()):
        return None
    wrong = [f"{name} ({count} times)" for name, count in counts.items() if count != 1]
    return (
        f"the first call of this {geometry.model} did not use every site once, as self-attention:"
        f" {', '.join(wrong)}"
    )


def misfit(site: Site, layouts: tuple[Layout, ...], q: Tensor) -> str | None:
    """Where a call has other samples or tokens than its layouts."""
    if len(layouts) not in (1, q.shape[0]):
        return f"{site.name} has {q.shape[0]} samples, but layouts for {len(layouts)}"
    for layout in layouts:
        if layout.length != q.shape[2]:
            grids = " and ".join(map(str, layout.grids)) or "no grid"
            return (
                f"{site.name} has {q.shape[2]} tokens, but the layout ({grids}, with"
                f" {layout.text_tokens} of text) makes {layout.length}; pass layout= to"
                " accel.enable"
            )
    return None


def refusal(*tensors: Tensor) -> str | None:
    """What about the tensors of a call no sparse kernel can do."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return GRADIENTS
    if tensors[0].dtype not in DTYPES:
        return f"the model computes in {tensors[0].dtype}, which the sparse kernels do not"
    if tensors[0].shape[-1] > MAX_DIM:
        return f"the head dim is {tensors[0].shape[-1]}; the sparse kernels take up to {MAX_DIM}"
    return None


def too_short(plan: Plan, tokens: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Where a call has fewer tokens than the plan's crossover on the device."""
    least = plan.crossover(device.type, str(dtype).removeprefix("torch."))
    if tokens >= least:
        return None
    return f"sparse attention is predicted to gain nothing below {least} tokens here"


def unexplained(site: Site, run: Run, valid: Bool[Tensor, "batch tokens"] | None) -> str | None:
    """Where the keys that an attention mask leaves are others than the layout's.

    Looked at once for a site and branch of a run: each look waits for the device.
    """
    if valid is None or (site.name, run.branch) in run.explained:
        return None
    if not torch.equal(valid, valid_keys(run.here, valid.device).expand_as(valid)):
        return "the call has an attention mask that the layout does not explain"
    run.explained.add((site.name, run.branch))
    return None
