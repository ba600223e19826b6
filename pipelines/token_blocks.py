"""Vision transformers whose blocks pass on fewer tokens than they got."""

from typing import Any

from torch import nn

from accel.context import Where
from accel.errors import PlanError
from accel.geometry import Site
from accel.intercept_calls import CallInterception
from accel.pipelines.reduced_blocks import ReducedBlocks
from accel.router import Session

__all__ = ["TokenInterception"]


class TokenInterception:
    """One vision transformer: its blocks where a plan reduces tokens, else its attention calls."""

    def __init__(self, session: Session, modules: dict[Site, nn.Module], *, model: nn.Module):
        self._model = model
        self._modules = modules
        self.taken = self._taken(session)

    def _taken(self, session: Session) -> CallInterception | ReducedBlocks:
        if not _reduces(session):
            return CallInterception(session, self._modules)
        _check(session, self._model)
        return ReducedBlocks(session, self._modules, self._model)

    def serve(self, session: Session) -> None:
        """Hand the model to another session."""
        if _reduces(session):
            _check(session, self._model)
        if isinstance(self.taken, ReducedBlocks) == _reduces(session):
            self.taken.serve(session)
        else:
            # the new one may be refused, and the old one then stays
            before, self.taken = self.taken, self._taken(session)
            before.undo()

    def undo(self) -> None:
        self.taken.undo()

    @property
    def intact(self) -> bool:
        """Whether every part is still called as it was taken."""
        return self.taken.intact


def _reduces(session: Session) -> bool:
    tokens = session.plan.tokens
    if tokens is None or session.plan.schedule.at(Where(0, 1)).dense:
        return False
    return min(tokens.keeps.values(), default=1.0) < 1


def _check(session: Session, model: Any) -> None:
    """Refuse what a plan asks for besides, and a score that the model has not."""
    plan, how = session.plan, session.plan.tokens
    if plan.wants_sparse or plan.dense != "host":
        raise PlanError(
            f"plan {plan.name!r} has `tokens` and attention that is not the host's; layouts of"
            " sparse calls know no merged tokens: leave `tokens` out, or make all choices dense"
            " (dense: 'host')"
        )
    by_class = how is not None and (how.method, how.score) == ("fuse", "class")
    if by_class and model.cls_token is None:
        raise PlanError(
            f"plan {plan.name!r}: tokens.score is 'class', and this {type(model).__name__} has no"
            " class token; use 'mass'"
        )
