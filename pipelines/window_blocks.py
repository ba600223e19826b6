"""Windowed vision models whose blocks compute some of their windows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from accel.geometry import Site
from accel.intercept import REDUCE, copy_plainly
from accel.router import Session

__all__ = ["WindowInterception"]


class WindowInterception:
    """The blocks of one windowed model. `undo` puts every one back as it was."""

    def __init__(self, session: Session, modules: dict[Site, nn.Module], *, model: nn.Module):
        self.session = session
        self._blocks = {}
        for site in modules:
            block = model.get_submodule(site.name.rpartition(".")[0])
            self._blocks[site] = block
            block.__dict__["forward"] = partial(self._forward, site, block.forward)
            copy_plainly(block, "forward")

    def serve(self, session: Session) -> None:
        """Hand the blocks to another session."""
        self.session = session

    def undo(self) -> None:
        for block in self._blocks.values():
            block.__dict__.pop("forward", None)
            block.__dict__.pop(REDUCE, None)

    @property
    def intact(self) -> bool:
        """Whether every block is still called as it was taken."""
        return all("forward" in block.__dict__ for block in self._blocks.values())

    def _forward(self, site: Site, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.session.probe is not None:
            self.session.probe[site.name] += 1
        return own(*args, **kwargs)
