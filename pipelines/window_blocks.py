"""Windowed vision models whose blocks compute some of their windows.

SparseViT (Chen et al., CVPR 2023, arXiv 2303.17605): the windows of a stage are ranked once, from
the tokens that enter its first block that leaves some out, for the unshifted and for the shifted
cut; a block takes the best of its cut, computes all that it computes on them alone, and passes the
others on unchanged. A block that keeps all of its windows is the host's own.
"""

import weakref
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from accel.context import Where
from accel.errors import PlanError
from accel.geometry import Site
from accel.intercept import REDUCE, copy_plainly
from accel.pipelines.window_hosts import host_block
from accel.pipelines.window_stage import Stage, WindowBlock
from accel.records import Record, Stopwatch, phase_label
from accel.router import Session
from accel.window_keeps import WindowKeeps, kept_of

__all__ = [
    "WindowInterception",
    "check_windows",
    "kept_windows",
    "stages_served",
    "window_stages",
]

# which model a session serves; weakly both ways, since an interception holds its session
_serving: "weakref.WeakKeyDictionary[Session, weakref.ref[WindowInterception]]"
_serving = weakref.WeakKeyDictionary()


class WindowInterception:
    """The blocks of one windowed model. `undo` puts every one back as it was.

    gather_all: blocks that keep all windows gather and scatter them as well, for tests and for
    measurements of what that costs.
    """

    def __init__(self, session: Session, modules: dict[Site, nn.Module], *, model: nn.Module):
        self._model = model
        self.gather_all = False
        self._blocks: dict[Site, WindowBlock] = {}
        self.stages = window_stages(model, [site.name for site in modules])
        by_name = {block.site: block for stage in self.stages for block in stage.blocks}
        self._blocks = {site: by_name[site.name] for site in modules}
        self.serve(session)
        # offloading also puts a forward on the module itself
        self._before = [b.module.__dict__.get("forward") for b in self._blocks.values()]
        for block in self._blocks.values():
            block.own = block.module.forward
            block.module.__dict__["forward"] = partial(self._forward, block)
            copy_plainly(block.module, "forward")

    def serve(self, session: Session) -> None:
        """Hand the blocks to another session."""
        windows = check_windows(session, self.stages)
        where = session.plan.schedule.at(Where(0, 1))
        self._label = phase_label(where.band)
        for block in self._blocks.values():
            block.keep = 1.0 if where.dense else windows.of(block.site)
        for stage in self.stages:
            stage.start(windows.score)
        self.session = session
        _serving[session] = weakref.ref(self)

    def undo(self) -> None:
        for block, before in zip(self._blocks.values(), self._before, strict=True):
            block.module.__dict__.pop("forward", None)
            block.module.__dict__.pop(REDUCE, None)
            if before is not None:
                block.module.__dict__["forward"] = before

    @property
    def intact(self) -> bool:
        """Whether every block is still called as it was taken."""
        return all("forward" in block.module.__dict__ for block in self._blocks.values())

    def begun(self) -> None:
        """A call of the model begins: what its blocks keep is known from the size of its map."""
        if self.session.probe is not None:
            return
        layout = self.session.run.layout
        for stage in self.stages:
            stage.last = None
        for site, block in self._blocks.items():
            windows = None if layout is None else block.host.windows(layout.grid[1:])
            kept = None if windows is None else kept_of(block.keep, windows)
            if windows is None or kept is None:
                continue
            record = self.session.records.setdefault((site.name, self._label), Record())
            record.calls, record.keep = 1, kept / windows
            record.kernels.add("host" if kept == windows else "windows")

    def _forward(self, block: WindowBlock, x: Tensor) -> Tensor:
        if self.session.probe is not None:
            self.session.probe[block.site] += 1
            return block.own(x)
        if block.keep == 1 and not self.gather_all:
            return block.own(x)
        if torch.compiler.is_compiling():
            return block.run(x, self.gather_all)
        record = self.session.records.get((block.site, self._label))
        watch = None if record is None else Stopwatch(record, x.device)
        out = block.run(x, self.gather_all)
        if watch is not None:
            watch.stop()
        return out


def check_windows(session: Session, stages: list[Stage]) -> WindowKeeps:
    """The keeps of a session's plan, if this model's blocks can have them."""
    plan = session.plan
    if plan.wants_sparse or plan.dense != "host":
        raise PlanError(
            f"plan {plan.name!r} has attention that is not the host's, for which a"
            f" {session.geometry.model} has no use: its attention is inside small windows; give"
            " keeps of windows (recipe 'sparsevit')"
        )
    windows = WindowKeeps({}) if plan.windows is None else plan.windows
    for stage in stages:
        least: dict[bool, tuple[str, float]] = {}
        for block in stage.blocks:
            keep, shifted = windows.of(block.site), block.host.shifted
            if keep < 1 and block.host.obstacle is not None:
                raise PlanError(
                    f"windows.keeps[{block.site!r}] is {keep}, but this block"
                    f" {block.host.obstacle}; leave it out"
                )
            before, low = least.get(shifted, ("", 1.0))
            if keep > low:
                raise PlanError(
                    f"windows.keeps[{block.site!r}] is {keep}, more than the {low} of {before!r}"
                    " before it; keeps do not grow within a stage from block to block of one shift"
                )
            least[shifted] = (block.site, keep)
    return windows


def window_stages(model: nn.Module, sites: list[str]) -> list[Stage]:
    """Blocks in a row that share their rankings: of one stage, or between two global blocks."""
    stages: list[Stage] = []
    last = None
    for name in sites:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        host = host_block(model, module, path)
        # a block that cannot be pruned is a stage by itself
        key = path if host.obstacle else (path.rpartition(".")[0], host.kind)
        if key != last:
            stage = Stage(path, model, path.rpartition(".blocks.")[0])
            if stage.name in {known.name for known in stages}:  # behind a block that stands alone
                stage.name = path
            stages.append(stage)
            last = key
        stages[-1].add(WindowBlock(name, module, host))
    return stages


def stages_served(session: Session) -> list[Stage]:
    """The stages of the model that a session serves, none where its blocks have no windows."""
    held = _serving.get(session)
    serving = None if held is None else held()
    return [] if serving is None else serving.stages


def kept_windows(session: Session) -> dict[str, Bool[Tensor, "batch rows columns"]]:
    """Which windows the last call computed, by stage, of every image; of the unshifted cut where
    it is pruned. Stages that left none out are not named.
    """
    found: dict[str, Tensor] = {}
    for stage in stages_served(session):
        if stage.last is not None:
            windows, rows, columns = stage.last
            kept = torch.zeros(len(windows), rows * columns, dtype=torch.bool)
            found[stage.name] = kept.scatter(1, windows.cpu(), True).unflatten(1, (rows, columns))
    return found
