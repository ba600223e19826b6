"""What selections kept in a generation: of some of them only the call can tell how much that is."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from accel.choice import Choice
from accel.router import Session
from accel.run_masks import selected_keeps

__all__ = ["SeenKeeps"]


class SeenKeeps:
    """The fraction of blocks that every choice which looks at q and k computed, from the masks that
    hold at the end of each step: in the mean over its heads, sites, branches and steps.

    Given to a pipeline as `callback_on_step_end`, for masks of an earlier band are let go.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._seen: dict[Choice, list[float]] = defaultdict(list)

    def __call__(self, pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> Any:
        for session in self._sessions:
            for choice, keep in selected_keeps(session.run):
                self._seen[choice].append(keep)
        return state

    @property
    def means(self) -> dict[Choice, float]:
        """As `accel.cost.price` takes them."""
        return {choice: fmean(keeps) for choice, keeps in self._seen.items()}
