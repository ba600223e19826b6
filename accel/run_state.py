"""The state of one generation: where it stands, and what it keeps from call to call."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accel.cached_tokens import SiteTokens
from accel.choice import Choice
from accel.context import Where
from accel.drift import BlockMeans
from accel.head_shares import HeadShares, Spread
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.layouts import Layouts
from accel.masks import SiteMask
from accel.records import Record
from accel.schedule import Phase
from accel.stand_in import Outputs
from accel.text_step import TextStep

UNNAMED_CALLS = 3  # of one step at most: guidance in three directions


class MaskKey(NamedTuple):
    """What a mask was made for.

    owner: site and branch whose queries and keys it looked at, None for patterns alone; dense:
    heads that are dense in it for their low recall, whatever their choice. heads: which of a site
    these are where it looked at some of them only; more: dense heads that follow on them.
    """

    owner: tuple[str, str] | None
    choices: tuple[Choice, ...]
    layout: Layout
    generation: tuple[int, int] | None
    batch: int | None
    device: torch.device
    dense: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    more: int = 0


@dataclass(slots=True)
class Run:
    """What one generation keeps between steps. A fresh one replaces it when a run begins.

    where, layouts: the last ones known; phase, then: of this step and of the one after it; placed:
    whether the call of the moment has a place of its own; first_step, first_branches: where the run
    began.
    here, layout, branch: of the site that is running: the layouts of its samples, the one of all of
    them (None where they differ), and the guidance branch; a model that calls a site sample by
    sample (Mochi) has a branch for each. calls: of the sites in this denoiser call, as
    self-attention.
    said: the last place as it was given; turns: calls of its step so far, by branch.
    anchors: means of the blocks that the masks of a site and branch were made for; weak: heads
    under the plan's floor of recall, while their mask lives; explained: sites and branches whose
    attention mask was seen to be the padding of their layout; off: sites that were measured to be
    slower than dense, with the reason; dense_alike: dense calls that were made for their times
    alone, by kind of site; sparse_alike: sites of one kind with the same choices, and what was
    measured of them where they are slower than dense; outputs: what later calls take over; shares:
    how the heads of sites are dealt to the ranks of a call, where there are several; spread: of the
    site that is running, who has which of its tokens, None where this rank has them all.
    text: what the pipeline of a text model said of the call; tokens: by site, what whole calls left
    for those that feed some tokens; token_bytes: the most that these took.
    """

    where: Where | None = None
    layout: Layout | None = None
    layouts: Layouts = field(default_factory=Layouts)
    here: tuple[Layout, ...] = ()
    branch: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    placed: bool = False
    phase: Phase = field(default_factory=lambda: Phase(None, 0))
    then: Phase = field(default_factory=lambda: Phase(None, 0))
    reason: str | None = None
    masks: dict["MaskKey", SiteMask] = field(default_factory=dict)
    explained: set[tuple[str, str]] = field(default_factory=set)
    full: dict[Any, BlockMask] = field(default_factory=dict)
    patterns: dict[Any, Tensor] = field(default_factory=dict)
    lse: dict[Any, dict[int, Tensor]] = field(default_factory=dict)
    recalls: dict[Any, Tensor] = field(default_factory=dict)
    weak: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    anchors: dict[Any, BlockMeans] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    dense_alike: dict[Any, Record] = field(default_factory=dict)
    sparse_alike: dict[Any, dict[str, str | None]] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=Outputs)
    shares: HeadShares = field(default_factory=HeadShares)
    spread: Spread | None = None
    first_step: int | None = None
    first_branches: set[str] = field(default_factory=set)
    said: Where | None = None
    turns: Counter[str] = field(default_factory=Counter)
    text: TextStep | None = None
    tokens: dict[str, SiteTokens] = field(default_factory=dict)
    token_bytes: int = 0

    def take(self, where: Where) -> None:
        """Note `where`; the second call of a step under one name is the branch "name#2", but of a
        text, which has every branch in one call and may take more steps than were asked for.
        """
        if self.said is None or self.said.step != where.step or where.block is not None:
            self.outputs.next_step()
            self.turns.clear()
        self.said = where
        self.outputs.calls += 1
        self.turns[where.branch] += 1
        turn = self.turns[where.branch]
        self.where = where if turn == 1 else replace(where, branch=f"{where.branch}#{turn}")
        if self.first_step is None:
            self.first_step = where.step
        if where.step == self.first_step:
            self.first_branches.add(self.where.branch)

    def ends_before(self, layouts: Layouts | None, where: Where | None) -> bool:
        """Whether a call belongs to another generation than the one before it.

        The scheduler has other timesteps, the step went back, the number of steps or the grids
        changed, or, where no scheduler tells, the first step of a branch is said a second time (a
        run that was interrupted in its first step).
        """
        last = self.said
        if where is not None and where.block is not None:
            # a text: its loop tells, and what a call computes may change with every block
            return last is None or where.run is not last.run
        if layouts is not None and self.layouts.grids not in (set(), layouts.grids):
            return True
        if where is None or last is None:
            return False
        if where.run is not last.run or where.total != last.total or where.step < last.step:
            return True
        again = where.step == self.first_step and where.branch in self.first_branches
        # calls in one block of `accel.step` have one place between them: they are guidance
        return again and where.run is None and where is not last

    def leaves_out_steps(self, where: Where) -> bool:
        """Whether steps were left out that no scheduler vouches for: it may be another run."""
        return self.said is not None and where.run is None and where.step > self.said.step + 1

    def begin(self, layouts: Layouts | None) -> None:
        """A call of the denoiser begins; None leaves the layouts as they were."""
        self.layouts = layouts or self.layouts
        self.layout = self.layouts.longest if self.layouts != Layouts() else None
        self.calls.clear()

    def enter(self, site: str, batch: int, *, counts: bool = True) -> None:
        """A site is called, with `batch` samples; counts: as self-attention."""
        turn, here = self.calls[site], self.layouts.at(site)
        self.calls[site] += counts
        self.here = here[turn : turn + 1] if batch == 1 < len(here) else here
        self.layout = self.here[0] if len(self.here) == 1 else None
        self.branch = "" if self.where is None else self.where.branch
        if turn:
            self.branch += f"@{turn}"

    def forget(self) -> None:
        """Let go of what was found in the queries and keys of earlier steps."""
        self.masks = {key: mask for key, mask in self.masks.items() if key.owner is None}
        for found in (self.lse, self.recalls, self.weak, self.anchors):
            found.clear()
        self.outputs = Outputs()
        self.shares.rows.clear()
        self.first_step = None
        self.first_branches.clear()

    def let_go(self, owner: tuple[str, str]) -> None:
        """Drop the masks of a site and branch, and what was seen of them."""
        self.masks = {key: mask for key, mask in self.masks.items() if key.owner != owner}
        for seen in (self.recalls, self.weak):
            for key in [key for key in seen if key[:2] == owner]:
                del seen[key]

    def stands_still(self, branch: str) -> bool:
        """Whether a step has more calls than guidance makes: then nobody steps the scheduler."""
        return self.turns[branch] > (1 if branch else UNNAMED_CALLS)
