"""What the blocks of a model hand on beside the tensor that passes between them.

It cannot ride with that tensor, so it lives beside the model. A block that is computed again for
its gradients (activation checkpointing) comes later, in the backward pass, maybe after other calls
of the model: what entered it in the call is found again by the tensor that enters it, which its
checkpoint keeps alive. Where a checkpoint covers several blocks only the first one's is; the others
get what is handed on, as in the call.
"""

import threading
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from accel.backward import current_pass

__all__ = ["Entered", "HandedOn"]


class HandedOn:
    """From one block to the next, in one thread, and in one pass: what is left over from a call is
    not what a backward pass goes on with, nor the other way round.
    """

    def __init__(self) -> None:
        # none of a subclass: at a graph break torch.compile forgets what is written to that
        self._thread = threading.local()
        self.put(None)

    def put(self, value: Any) -> None:
        self._thread.left = (value, current_pass())

    def get(self) -> Any:
        """None where nothing was handed on."""
        value, of_pass = getattr(self._thread, "left", (None, -1))
        return value if of_pass == current_pass() else None


class Entered:
    """By tensors that entered blocks, as long as they live."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Any]] = {}

    def put(self, x: Tensor, value: Any, *of: Any) -> None:
        """of: tells apart what one tensor enters."""
        for key, (storage, _) in [*self._known.items()]:
            if storage.expired():
                self._known.pop(key, None)
        self._known[(_identity(x), *of)] = StorageWeakRef(x.untyped_storage()), value

    def find(self, x: Tensor, *of: Any) -> Any:
        """None where nothing is known; memory that was taken over by another tensor is not x."""
        storage, value = self._known.get((_identity(x), *of), (None, None))
        return None if storage is None or storage.expired() else value


def _identity(x: Tensor) -> tuple[int, int, int]:
    """What a tensor and its detached copies have in common, until it is written to."""
    version = 0 if x.is_inference() else x._version
    return x.untyped_storage()._cdata, int(x.storage_offset()), version
