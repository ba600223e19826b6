"""Which tokens each call of a text model feeds: a plan's cache, laid over one generation.

A slot is a place in the batch's sequence [left padding, prompt, generated tokens]; samples of a
batch share the slots of what is generated. What a call says to accel (`accel.text_step`) is in
places of whole calls, which may leave out masked tokens far ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from accel.layout import Layout
from accel.text_step import TextStep
from accel.token_cache import TokenCache

__all__ = ["Fed", "TokenFeed"]

WHOLE = TokenCache(refresh=1)  # without a cache every call is whole


@dataclass(frozen=True, slots=True, eq=False)
class Fed:
    """slots: of the tokens to feed, one row for all samples or one for each.

    rows: where the logits of the block's tokens are, among the tokens fed: [start, stop), or
    None where they are to be looked up by `slots`.
    """

    step: TextStep
    slots: Int[Tensor, "rows fed"]
    rows: tuple[int, int] | None


class TokenFeed:
    """The calls of one generation.

    prompt: slots before the generated tokens; blocks: slots [start, stop) of each block; real:
    slots that are no padding, None where all are. steps: that the quota asks for in each block, 1
    for each of its tokens where that is None. shift: the logits of a token are those of the
    slot before it (Dream), which is fed as well.
    """

    def __init__(
        self,
        cache: TokenCache | None,
        *,
        prompt: int,
        blocks: Sequence[tuple[int, int]],
        real: Bool[Tensor, "batch tokens"] | None,
        shift: bool,
        steps: Sequence[int] | None = None,
        device: torch.device,
    ) -> None:
        self._cache = cache or WHOLE
        self._prompt, self._blocks, self._real = prompt, list(blocks), real
        self._shift = shift
        self._device = device
        self._steps = [b - a for a, b in self._blocks] if steps is None else list(steps)
        self._group = -1
        self._slots = torch.arange(0)
        self._layouts: tuple[Layout, ...] = ()
        self._valid: Tensor | None = None

    def next(self, index: int, turn: int, undecided: Bool[Tensor, "batch tokens"]) -> Fed:
        """The next call, for block `index`; turn: the block's calls before it.

        undecided: which generated tokens were masked before the last step.
        """
        size = self._cache.blocks or len(self._blocks)
        if index // size != self._group:
            self._begin(index // size, size)
        before = self._steps[index - index % size : index]
        step_of_group = sum(before) + min(turn, self._steps[index] - 1)
        start, stop = self._blocks[index]
        block = (self._before(start), stop)
        step = TextStep(self._layouts, block, self._live(), valid=self._valid)
        if self._cache.whole(step_of_group):
            step = TextStep(
                self._layouts, block, self._live(), None, self._valid, self._cache.holds
            )
            return Fed(step, self._slots[None], block)
        kind = self._cache.feed
        inside = index % size > 0
        if kind == "undecided":
            places = self._undecided(undecided)
            return Fed(
                TextStep(self._layouts, block, self._live(), places, self._valid),
                self._slots[places],
                None,
            )
        begin = self._before(self._prompt) if kind == "generated" else block[0]
        end = stop if kind == "block" else len(self._slots)
        if turn == 0 and inside and kind != "generated":
            begin = self._before(self._blocks[index - 1][0])
        places = torch.arange(begin, end, device=self._device)[None]
        rows = (block[0] - begin, block[1] - begin)
        fed = TextStep(self._layouts, block, self._live(), places, self._valid)
        return Fed(fed, self._slots[places], rows)

    def _begin(self, group: int, size: int) -> None:
        self._group = group
        length = self._blocks[-1][1]
        self._first = self._blocks[group * size][0]
        self._end = self._blocks[min((group + 1) * size, len(self._blocks)) - 1][1]
        seen = length if self._cache.window is None else min(length, self._end + self._cache.window)
        slots = torch.arange(seen, device=self._device)
        if seen < length:
            slots = torch.cat([slots, slots.new_tensor([length - 1])])
        self._slots = slots
        generated = len(slots) - self._prompt
        padding = [0]
        self._valid = None
        if self._real is not None:
            self._valid = self._real[:, slots]
            padding = (~self._real[:, : self._prompt]).sum(1).tolist()
        self._layouts = tuple(
            Layout.join(
                [
                    ("pad", pad),
                    *([(1, 1, self._prompt - pad)] if pad < self._prompt else []),
                    (1, 1, generated),
                ]
            )
            for pad in padding
        )

    def _before(self, slot: int) -> int:
        """Where the logits of the token in `slot` are."""
        return max(slot - self._shift, 0)

    def _live(self) -> tuple[int, int]:
        kind = self._cache.feed
        first = self._first if kind in ("block", "suffix") else self._prompt
        return (self._before(first), self._end if kind == "block" else len(self._slots))

    def _undecided(self, undecided: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "rows fed"]:
        """Places of every sample's tokens, filled up with its last one to the same number."""
        asked = undecided[:, self._slots[self._prompt :] - self._prompt]
        first = self._before(self._prompt)
        if self._shift:
            none = torch.zeros(len(asked), 1, dtype=torch.bool, device=asked.device)
            asked = torch.cat([none[:, : self._prompt - first], asked], 1)
            asked = asked | torch.cat([asked[:, 1:], none], 1)
        places = torch.sort(~asked, dim=1, stable=True).indices
        counts = asked.sum(1, keepdim=True).clamp(min=1)
        number = torch.arange(int(counts.max()), device=asked.device).expand(len(asked), -1)
        number = torch.minimum(number, counts - 1)
        return places.gather(1, number) + first
