"""The layouts of a denoiser's calls, read again only when something they depend on changes.

Masks and positions lie on the device: to look at them waits for it. A pipeline passes the same
ones in every step, so each is looked at once in a run.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from accel.layouts import Layouts
from accel.pipelines.adapters import Adapter, Call

MOST = 8  # kinds of call of one run: guidance branches, with reference images and without


class CallReader:
    """Reads layouts by an adapter.

    A tensor of `adapter.contents` is known again by its memory and version. It is held as long as
    its layouts are, so that its memory is not another's by then.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._known: OrderedDict[Hashable, tuple[Layouts | str, Any]] = OrderedDict()

    def layouts(self, model: nn.Module, call: Call) -> Layouts | str:
        """The layouts of a call, or why they are unknown."""
        adapter = self._adapter
        key = tuple(_identity(call[n], n in adapter.contents) for n in adapter.arguments)
        if key not in self._known:
            found = adapter.layout(model, call)
            layouts = found if isinstance(found, str) else Layouts.of(found)
            self._known[key] = layouts, [call[name] for name in adapter.contents]
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        return self._known[key][0]


def _identity(value: Any, by_content: bool) -> Hashable:
    """What tells a value from another: the memory of a tensor, or its shape alone."""
    if isinstance(value, Tensor):
        if not by_content:
            return tuple(value.shape)
        # tensors of inference mode have no version
        version = None if value.is_inference() else value._version
        return value.device, value.data_ptr(), tuple(value.shape), value.stride(), version
    if isinstance(value, list | tuple):
        return tuple(_identity(item, by_content) for item in value)
    return value if isinstance(value, Hashable) else None
