"""A stage of a windowed model: the blocks that share their rankings of windows, for one call.

A ranking goes from block to block beside the tokens. It is dropped by the last block that needs it,
so that nothing of a call meets the next one.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accel.backward import in_backward
from accel.pipelines.between_blocks import Entered, HandedOn
from accel.pipelines.window_hosts import HostBlock
from accel.window_keeps import kept_of
from accel.window_ranking import Cut, Places, gather, places_of, ranked, scatter, token_energy

__all__ = ["Stage", "WindowBlock"]

SIZES = 8  # of maps, whose tables and masks are kept; of two cuts each


class Ranking(NamedTuple):
    """The best windows of one cut, [batch kept], and where their tokens lie."""

    windows: Tensor
    places: Places


Rankings = dict[bool, Ranking]  # by shift


class Stage:
    """Blocks in a row with one map of tokens.

    last: of the last call the windows of the unshifted cut, [batch kept], and the rows and columns
    of windows; None where all were computed.
    """

    def __init__(self, first: str, model: nn.Module, path: str) -> None:
        self.name = path or first
        self.blocks: list[WindowBlock] = []
        # whoever holds the blocks knows whether they are computed again for gradients
        self._holders = (model, model.get_submodule(path)) if path else (model,)
        self.last: tuple[Tensor, int, int] | None = None
        self.start("norm_of_means")

    def add(self, block: "WindowBlock") -> None:
        block.stage = self
        self.blocks.append(block)

    def start(self, score: str) -> None:
        """Begin anew, with other keeps."""
        self.score = score
        self._now = HandedOn()
        self._entered = Entered()
        self.last = None
        self._tables: OrderedDict[Any, Tensor] = OrderedDict()
        self._masks: OrderedDict[Any, Tensor | None] = OrderedDict()

    @property
    def checkpoints(self) -> bool:
        """Whether the host computes blocks again for gradients."""
        return any(getattr(holder, "grad_checkpointing", False) for holder in self._holders)

    def pruned(self, windows: int, gather_all: bool) -> list["WindowBlock"]:
        """The blocks that gather windows, of so many."""
        return [b for b in self.blocks if gather_all or kept_of(b.keep, windows) < windows]

    def rankings(self, block: "WindowBlock", x: Tensor, gather_all: bool) -> Rankings:
        """The rankings of the call that x is of, found by the first block that leaves some out."""
        follows = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or self.checkpoints
        )
        now: Rankings | None = self._entered.find(x) if follows and in_backward() else None
        pruned = self.pruned(block.host.cut(x).windows, gather_all)
        if now is None and block is not pruned[0]:
            now = self._now.get()
        if now is None:  # a block that is called by itself ranks its own tokens
            now = self._rank(x, pruned)
        self._now.put(None if block is pruned[-1] else now)
        if follows:
            self._entered.put(x, now)
        return now

    def _rank(self, x: Tensor, pruned: list["WindowBlock"]) -> Rankings:
        found: Rankings = {}
        with torch.no_grad():
            flat = x.detach().flatten(1, -2)
            energy = token_energy(flat, self.score)
            for block in pruned:
                if block.host.shifted in found:
                    continue
                cut = block.host.cut(x)
                table = self.table(cut, x.device)
                windows = ranked(energy, table, kept_of(block.keep, cut.windows))
                places = places_of(windows, table, cut.tokens, cut.ragged)
                found[block.host.shifted] = Ranking(windows, places)
        unshifted = found.get(False, found.get(True))
        if unshifted is not None:
            rows, columns = pruned[0].host.cut(x).counts
            self.last = (unshifted.windows, rows, columns)
        return found

    def table(self, cut: Cut, device: torch.device) -> Tensor:
        """`Cut.table`, made once for every size of a map."""
        if torch.compiler.is_compiling():
            return cut.table(device)
        return _known(self._tables, (cut, device), lambda: cut.table(device))

    def mask(self, host: HostBlock, x: Tensor) -> Tensor | None:
        """The host's mask; one that it would make anew in every call is made once for a size."""
        if torch.compiler.is_compiling() or not host.dynamic_mask():
            return host.mask(x)
        return _known(self._masks, (host.cut(x), x.device, x.dtype), lambda: host.mask(x))


class WindowBlock:
    """One block: its module, what is known of it, and how much it keeps."""

    own: Callable[[Tensor], Tensor]
    stage: Stage

    def __init__(self, site: str, module: nn.Module, host: HostBlock) -> None:
        self.site, self.module, self.host = site, module, host
        self.keep = 1.0

    def run(self, x: Tensor, gather_all: bool = False) -> Tensor:
        """The block, on the windows that it keeps."""
        if self.host.obstacle is not None:
            return self.own(x)
        windows = self.host.cut(x).windows
        kept = kept_of(self.keep, windows)
        if kept == windows and not gather_all:
            return self.own(x)
        if torch.compiler.is_compiling() and self.stage.checkpoints:
            return _eagerly(self, x, kept, gather_all)
        return self._inside(x, kept, gather_all)

    def _inside(self, x: Tensor, kept: int, gather_all: bool) -> Tensor:
        ranking = self.stage.rankings(self, x, gather_all)[self.host.shifted]
        places, kind = ranking.places.first(kept), ranking.windows[:, :kept]
        flat = x.flatten(1, -2)
        rows = self.host.inside(
            gather(flat, places), places.valid, self.stage.mask(self.host, x), kind
        )
        return scatter(flat, places, rows).view(x.shape)


def _known(made: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What is made once for every size of a map, as long as it is one of the last few."""
    if key not in made:
        # a call without gradients may come first, and one with them use it later
        with torch.inference_mode(False), torch.no_grad():
            made[key] = make()
        while len(made) > SIZES:
            made.popitem(last=False)
    made.move_to_end(key)
    return made[key]


@torch.compiler.disable
def _eagerly(block: WindowBlock, x: Tensor, kept: int, gather_all: bool) -> Tensor:
    """What a ranking does while blocks are computed again, no compiler follows."""
    return block._inside(x, kept, gather_all)
