"""What all estimators share.

* q, k and v come in natural layout; blocks are those of `blocking`, in its order.
* Scores become blocks by the rules of `accel.ranking`: text is kept, padding never, every row with
  a valid query keeps at least one block.
* Scores are fp32: half-precision ties at the cut would favour one region.
* Where a share of the blocks is asked for and nothing else, the field that holds it is `keep`; an
  estimator without one keeps as many as the call needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from accel.blocking import Blocking
from accel.heads import by_key_head
from accel.kernels.arguments import check_tensors, valid_lengths
from accel.kernels.pooling import in_order
from accel.kind import Kind, from_kind

__all__ = [
    "ESTIMATORS",
    "Call",
    "Estimator",
    "Selection",
    "check_fraction",
    "check_switch",
    "estimator_from_dict",
]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What an estimator found.

    keep: the blocks to compute. lse: the log-sum-exp of every query row in natural layout, to
    hand back at the next refresh. recall: share of softmax mass inside `keep`. taken: for every
    head the option that was taken, where there are options, in whose order the head's blocks then
    are. The last three are None where the estimator does not tell them.
    """

    keep: Bool[Tensor, "batch heads q_blocks kv_blocks"]
    lse: Float[Tensor, "batch heads tokens"] | None = None
    recall: Float[Tensor, "batch heads"] | None = None
    taken: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One attention call, checked, with defaults filled in; tensors in natural layout.

    lengths: valid tokens of each batch element; padded: whether that may be fewer than all.
    patterns: block masks of patterns met before (`known_mask`). scores: what was found in this very
    call before, in the same order, by work of the estimator. order: of `blocking`, int64
    `[tokens]`, None where it is natural. valid: which tokens are, in order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocking: Blocking
    scale: float
    lse: Tensor | None
    lengths: Int[Tensor, " batch"]
    padded: bool
    patterns: dict[Any, Tensor]
    scores: dict[str, Any]
    order: Int[Tensor, " tokens"] | None = field(init=False)
    valid: Bool[Tensor, "batch tokens"] = field(init=False)

    def __post_init__(self) -> None:
        device = self.q.device
        order = self.blocking.indices(device)
        places = torch.arange(self.q.shape[2], device=device) if order is None else order
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "valid", places < self.lengths[:, None])

    @property
    def settings(self) -> dict[str, Any]:
        """What every estimator kernel asks for beside its tensors."""
        return {
            "block": self.blocking.block,
            "scale": self.scale,
            "kv_length": self.lengths,
            "order": self.order,
        }

    @property
    def columns(self) -> Bool[Tensor, "batch 1 1 kv_blocks"]:
        """Key blocks that hold a valid token."""
        size = self.blocking.block[1]
        inside = pad(self.valid, (0, -self.valid.shape[1] % size))
        return inside.unflatten(1, (-1, size)).any(2)[:, None, None]

    @property
    def visual(self) -> Bool[Tensor, "batch 1 1 kv_blocks"]:
        """Those of them without text: what competes."""
        return self.columns & ~self.blocking.text_blocks(self.q.device)[1]

    def ordered(
        self, x: Float[Tensor, "batch some_heads tokens dim"]
    ) -> Float[Tensor, "batch some_heads tokens dim"]:
        """x in the order of the blocks, padding at 0; fp32."""
        x = in_order(x, None if self.order is None else self.order[None]).float()
        return x.masked_fill(~self.valid[:, None, :, None], 0.0)

    def means(
        self, x: Float[Tensor, "batch some_heads tokens dim"], size: int
    ) -> tuple[Float[Tensor, "batch some_heads runs dim"], Float[Tensor, "batch 1 runs"]]:
        """Means over the valid tokens of every `size` places in order, and their number; fp32."""
        tail = -x.shape[2] % size
        count = pad(self.valid.float(), (0, tail)).unflatten(1, (-1, size)).sum(2)[:, None]
        total = pad(self.ordered(x), (0, 0, 0, tail)).unflatten(2, (-1, size)).sum(3)
        return total / count.clamp(min=1)[..., None], count

    def products(
        self,
        q: Float[Tensor, "batch heads rows dim"],
        k: Float[Tensor, "batch kv_heads columns dim"],
    ) -> Float[Tensor, "batch heads rows columns"]:
        """Logits: every row with every column of its key head, times the scale."""
        return by_key_head(q * self.scale, k.mT)

    def settled(
        self, keep: Bool[Tensor, "batch heads q_blocks kv_blocks"]
    ) -> Bool[Tensor, "batch heads q_blocks kv_blocks"]:
        """Text in, padding out."""
        return self.blocking.force(keep) & self.columns


ESTIMATORS: dict[str, type["Estimator"]] = {}


class Estimator(Kind):
    """A rule that selects blocks from q and k; those of this package are frozen dataclasses.

    in_one_order: whether blocks are in the order of the call, rather than that of an option.
    """

    __slots__ = ()
    in_one_order: ClassVar[bool] = True

    @property
    def by_head(self) -> bool:
        """Whether the blocks of a head are the same whichever heads are selected with it."""
        return True

    def select(
        self,
        q: Float[Tensor, "batch heads tokens dim"],
        k: Float[Tensor, "batch kv_heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens dim"],
        *,
        blocking: Blocking,
        scale: float | None = None,
        kv_length: int | Int[Tensor, " batch"] | None = None,
        lse: Float[Tensor, "batch heads tokens"] | None = None,
        patterns: dict[Any, Tensor] | None = None,
        scores: dict[str, Any] | None = None,
    ) -> Selection:
        """The blocks of this call, per batch element and head.

        Natural tokens from `kv_length` on are padding, as are those of the layout. `scale` is
        `dim ** -0.5` unless given. An `lse` of an earlier step saves the estimators that weigh
        true mass a pass: the rows' normalisers hardly move between steps (AdaSpa). `patterns`
        holds the masks of the patterns met so far, for estimators that have any; `scores` what
        others found in the same tensors, lengths, blocks and order, for those that do the same work
        with another share. Both are read and filled.
        """
        check_tensors(q, k, v)
        layout = blocking.layout
        if q.shape[2] != layout.length or k.shape[2] != layout.length:
            raise ValueError(
                f"the layout has {layout.length} tokens, got q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}"
            )
        lengths = valid_lengths(layout.length if kv_length is None else kv_length, k)
        if lengths is None:
            lengths = torch.full(q.shape[:1], layout.length, device=q.device)
        call = Call(
            q,
            k,
            v,
            blocking,
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            lse=lse,
            lengths=lengths.clamp(max=layout.valid_length),
            padded=kv_length is not None or layout.valid_length < layout.length,
            patterns={} if patterns is None else patterns,
            scores={} if scores is None else scores,
        )
        with torch.no_grad():  # a choice of blocks has none
            return self.select_in(call)

    def check_block(self, block: tuple[int, int]) -> None:
        """Refuse, with a ValueError, blocks that this estimator cannot select."""

    @property
    def work(self) -> str:
        """Names what a selection takes: estimators that share it cost the same."""
        return self.kind

    def select_in(self, call: Call) -> Selection:
        """`select`, of a call that is checked."""
        raise NotImplementedError(f"{type(self).__name__} selects nothing")


def estimator_from_dict(data: Mapping) -> Estimator:
    """The estimator that `to_dict` wrote; unknown kinds, unknown keys and wrong types refused."""
    return from_kind(data, ESTIMATORS, "estimator")


def check_fraction(estimator: Estimator, name: str) -> None:
    """Field `name` as a float in (0, 1]."""
    value = getattr(estimator, name)
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ValueError(f"{name} is a fraction in (0, 1], got {value!r}")
    object.__setattr__(estimator, name, float(value))


def check_switch(estimator: Estimator, name: str) -> None:
    """Field `name` as a bool."""
    if type(getattr(estimator, name)) is not bool:
        raise ValueError(f"{name} is true or false, got {getattr(estimator, name)!r}")
