"""Outputs that no kernel computes: heads whose output is a value, or one computed before.

Heads with `Identity` output the value of the same token, those with `Share` an output of an
earlier call of their run. To the kernel both have no blocks; what stands in is put in place after
it. An output that will be taken over is kept from the call that has it, whatever computed that
call, and no longer than it is needed: `Share("step")` heads have theirs kept from the step before,
`Share("branch")` heads from the branch that comes first in a step, to the end of that step.

A head that shares for several steps passes on what it took over, so its error builds up. That is
the method (DiTFastAttn, arXiv 2406.08552), and what a search has to weigh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from accel.choice import Choice
from accel.pattern import Identity, Share, Skip

BEFORE, FIRST = Share("step"), Share("branch")
NOTHING = Choice(Skip())


class Kept(NamedTuple):
    """Outputs of some heads of a site."""

    heads: tuple[int, ...]
    out: Tensor  # [batch, len(heads), tokens, dim]

    def serves(self, q: Tensor) -> bool:
        """Whether the outputs have the shape, device and dtype of a call's."""
        shape = (q.shape[0], len(self.heads), *q.shape[2:])
        return self.out.shape == shape and (self.out.device, self.out.dtype) == (q.device, q.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class StandIns:
    """What takes the place of some outputs of one call.

    given: heads, and what they get; dense: heads whose choice found nothing to take over.
    """

    given: Mapping[int, Tensor] = field(default_factory=dict)  # head -> [batch, tokens, dim]
    dense: tuple[int, ...] = ()

    def put(self, out: Float[Tensor, "batch heads tokens dim"]) -> None:
        """Put them in place."""
        for head, given in self.given.items():
            out[:, head] = given


@dataclass(slots=True)
class Outputs:
    """The outputs that a run keeps for later calls.

    before: by site and branch, of its last call; first: by site, of this step's first call;
    calls, calls_before: calls of the denoiser in this step so far and in the step before, None in
    the first step.
    """

    before: dict[tuple[str, str], Kept] = field(default_factory=dict)
    first: dict[str, Kept] = field(default_factory=dict)
    calls: int = 0
    calls_before: int | None = None

    def next_step(self) -> None:
        """A step of the denoiser begins."""
        self.first.clear()
        self.calls, self.calls_before = 0, self.calls or None

    def stand_ins(
        self,
        choices: Sequence[Choice],
        site: str,
        branch: str,
        q: Float[Tensor, "batch heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens dim"],
    ) -> StandIns:
        """What the heads of one call take over."""
        given: dict[int, Tensor] = {}
        dense = []
        for head, select in enumerate(c.select for c in choices):
            if isinstance(select, Identity):
                given[head] = v[:, head * v.shape[1] // q.shape[1]]
            elif isinstance(select, Share):
                # of the first call in a step there is no earlier one
                kept = self.before.get((site, branch)) if select == BEFORE else self.first.get(site)
                if kept is None or head not in kept.heads or not kept.serves(q):
                    dense.append(head)
                else:
                    given[head] = kept.out[:, kept.heads.index(head)]
        return StandIns(given, tuple(dense))

    def keep(
        self,
        site: str,
        branch: str,
        out: Float[Tensor, "batch heads tokens dim"],
        now: Sequence[Choice],
        then: Sequence[Choice],
    ) -> None:
        """Keep of a call's output what later calls take over, in place of what was kept before.

        now, then: the choices of this step and of the next; none where they are dense.
        """
        self.before.pop((site, branch), None)
        if heads := _sharing(then, BEFORE):
            self.before[site, branch] = _of_heads(out, heads)
        if self.calls == self.calls_before:
            self.first.pop(site, None)
        # after a step of one call none is expected to have a second
        elif self.calls == 1 and (heads := _sharing(now, FIRST)):
            self.first[site] = _of_heads(out, heads)


def computed(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The choices as kernels see them: heads that something stands in for have no blocks."""
    return tuple(NOTHING if stands_in(c) else c for c in choices)


def stands_in(choice: Choice) -> bool:
    """Whether something else than a kernel's output is the output of a head."""
    return isinstance(choice.select, Identity | Share)


def _sharing(choices: Sequence[Choice], select: Share) -> tuple[int, ...]:
    return tuple(h for h, c in enumerate(choices) if c.select == select)


def _of_heads(out: Tensor, heads: tuple[int, ...]) -> Kept:
    # a copy, so that the rest of the output is let go; an index would have to go to the device
    return Kept(heads, torch.stack([out.detach()[:, head] for head in heads], 1))
