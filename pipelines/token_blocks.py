"""Vision transformers whose blocks pass on fewer tokens than they got."""

from torch import nn

from accel.geometry import Site
from accel.intercept_calls import CallInterception
from accel.router import Session

__all__ = ["TokenInterception"]


class TokenInterception(CallInterception):
    """The attention of one vision transformer, and its blocks."""

    def __init__(self, session: Session, modules: dict[Site, nn.Module], *, model: nn.Module):
        super().__init__(session, modules)
        self._model = model
