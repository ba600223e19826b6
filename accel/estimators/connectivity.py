"""A trained predictor of which blocks hold the mass (Sparsifiner), pooled to blocks."""

import base64
import binascii
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from accel.estimators.contract import ESTIMATORS, Call, Estimator, Selection, check_fraction
from accel.kind import register
from accel.ranking import top_blocks

__all__ = ["Connectivity", "block_statistics", "connectivity"]

MAX_HEADS, MAX_DIM = 4096, 256
PARTS = 3  # statistics of a channel

Rows = Float[Tensor, "batch heads q_blocks statistics"]
Columns = Float[Tensor, "batch heads kv_blocks statistics"]
Weights = Float[Tensor, "2 heads statistics rank"]


@register(ESTIMATORS, "connectivity")
@dataclass(frozen=True, slots=True)
class Connectivity(Estimator):
    """Low-rank products of block statistics, trained to tell the mass; the best `keep` per row.

    Sparsifiner (Wei et al., CVPR 2023, arXiv 2303.13755) learns which keys a query sees, from
    reduced channels of q and of token-reduced k, by the maps of dense attention. As here: for every
    head ``score[i, j] = (s a_i A) · (b_j B) + ln n_j``, with s the scale of the call, a_i and b_j
    the statistics of query block i and key block j (`block_statistics`), n_j its valid tokens, and
    A and B the head's own matrices ``[3 dim, rank]``.

    What departs: queries and keys are taken by blocks, so that a kernel gains by it, and their
    statistics stand in the place of the learned reduction of tokens, which is of one resolution.

    heads, dim, rank: what the matrices are for. All heads of a site have one `Connectivity`.
    bits: A of every head, then B of every head, as little-endian fp16; or that in base64, as files
    have it (a file beside the plan, see `accel.plan_file`). `samples/train_connectivity.py` makes
    them.
    """

    keep: int | float
    heads: int
    dim: int
    rank: int
    bits: bytes = field(repr=False)
    readers: ClassVar = {"bits": lambda value: _decoded(value)}

    def __post_init__(self) -> None:
        check_fraction(self, "keep")
        for name, most in (("heads", MAX_HEADS), ("dim", MAX_DIM), ("rank", PARTS * MAX_DIM)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is a number from 1 to {most}, got {value!r:.80}")
        size = 2 * 2 * self.heads * PARTS * self.dim * self.rank
        if type(self.bits) is not bytes or len(self.bits) != size:
            raise ValueError(f"bits are {size} bytes for these heads, dim and rank")
        if not np.isfinite(np.frombuffer(self.bits, "<f2")).all():
            raise ValueError("bits hold a weight that is not finite")

    @classmethod
    def of(cls, weights: Weights, keep: int | float) -> "Connectivity":
        """The estimator of trained matrices, rounded to fp16."""
        _, heads, statistics, rank = weights.shape
        rounded = weights.detach().cpu().numpy().astype("<f2")
        return cls(keep, heads, statistics // PARTS, rank, rounded.tobytes())

    @property
    def name(self) -> str:
        return f"{self.kind}(keep={self.keep},rank={self.rank})"

    @property
    def by_head(self) -> bool:
        """Its matrices are those of all heads of a site."""
        return False

    @property
    def work(self) -> str:
        return f"{self.kind}/{self.rank}"

    def to_dict(self) -> dict:
        values = {name: getattr(self, name) for name in ("keep", "heads", "dim", "rank")}
        return {"kind": self.kind, **values, "bits": base64.b64encode(self.bits).decode()}

    def weights(self, device: torch.device | str | None = None) -> Weights:
        """The matrices of queries and of keys, fp32."""
        flat = torch.from_numpy(np.frombuffer(self.bits, "<f2").astype(np.float32))
        return flat.reshape(2, self.heads, PARTS * self.dim, self.rank).to(device)

    def select_in(self, call: Call) -> Selection:
        _, heads, _, dim = call.q.shape
        if (heads, dim) != (self.heads, self.dim):
            raise ValueError(
                f"connectivity was trained for {self.heads} heads of {self.dim} channels, the call"
                f" has {heads} of {dim}; give one to all heads of the site that it was trained at"
            )
        scores = connectivity(*block_statistics(call), self.weights(call.q.device))
        scores = scores.masked_fill(~call.columns, -inf)
        return Selection(top_blocks(scores, self.keep, call.blocking))


def block_statistics(
    call: Call,
) -> tuple[Rows, Columns, Float[Tensor, "batch 1 kv_blocks"]]:
    """Of every query block (times the scale) and every key block mean, square of the mean, and
    variance of each channel; and the valid tokens of key blocks.

    The logarithm of the mean of ``exp(s q·k)`` over normal tokens with independent channels is a
    bilinear form of these: ``s q̄·k̄ + s² (q̄²·var k + k̄²·var q + var q·var k) / 2``.
    Squares are in units of the scale, so that all parts are alike in size.
    """
    found = []
    for x, size in zip((call.q, call.k), call.blocking.block, strict=True):
        x = x.float()
        mean, count = call.means(x, size)
        spread = (call.means(x.square(), size)[0] - mean.square()).clamp_min(0)
        parts = torch.cat([mean, mean.square() * call.scale, spread * call.scale], -1)
        found.append(parts.repeat_interleave(call.q.shape[1] // x.shape[1], 1))
    return found[0] * call.scale, found[1], count


def connectivity(
    q: Rows, k: Columns, count: Float[Tensor, "batch 1 kv_blocks"], weights: Weights
) -> Float[Tensor, "batch heads q_blocks kv_blocks"]:
    """Scores of pairs of blocks: estimates of the logarithm of their mass, but for one summand for
    each row. Gradients flow to the weights.
    """
    return (q @ weights[0]) @ (k @ weights[1]).mT + count.clamp_min(1).log()[:, :, None]


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"bits are no base64: {error}") from error
