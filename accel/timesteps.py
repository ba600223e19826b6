"""Which of a scheduler's timesteps a call is at, for schedulers that do not say where they stand.

DDIM, DDPM, PNDM and CogVideoX's schedulers have no step index. Nothing here waits for a device: a
pipeline passes its timestep as a view of the scheduler's timesteps, so its memory says which one it
is. Where it was copied on the way, values are compared on the CPU alone, and calls are counted
elsewhere.
"""

from typing import Any

from torch import Tensor


def position(timestep: Any, timesteps: Any) -> int | None:
    """The index of a call's timestep (one, or one for each sample) among a scheduler's."""
    if not isinstance(timestep, Tensor) or not isinstance(timesteps, Tensor):
        return None
    if timesteps.ndim != 1 or not timestep.numel() or timestep.device != timesteps.device:
        return None
    if timestep.dtype == timesteps.dtype and timesteps.is_contiguous():
        offset = timestep.data_ptr() - timesteps.data_ptr()
        if 0 <= offset < timesteps.nbytes:
            return offset // timesteps.itemsize
    if timesteps.device.type != "cpu":
        return None
    equal = (timesteps == timestep.flatten()[0]).nonzero()
    return int(equal[0]) if len(equal) else None


class StepCounter:
    """Counts the steps of a run by the timesteps of its calls.

    A step begins with another timestep tensor at the second call of a guidance branch: branches of
    one step may each have a copy of it. The last tensor is held, so that its memory is not another
    one's by then.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._timestep: Tensor | None = None
        self._memory: Any = None
        self._branches: set[str] = set()
        self._index = 0

    def index(self, timestep: Any, run: Any, branch: str) -> int | None:
        """The step of a call; run: an object that every run has a new one of."""
        if not isinstance(timestep, Tensor):
            return None
        # tensors of inference mode have no version
        memory = timestep.data_ptr(), None if timestep.is_inference() else timestep._version
        if run is not self._run:
            self._run, self._index = run, 0
            self._branches.clear()
        elif branch in self._branches and memory != self._memory:
            self._index += 1
            self._branches.clear()
        self._timestep, self._memory = timestep, memory
        self._branches.add(branch)
        return self._index
