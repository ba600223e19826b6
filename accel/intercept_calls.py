"""Taking the attention of modules that call torch's SDPA themselves, wherever they import it from.

Remote code of the hub is of this kind (LLaDA-8B, Dream). A module's `forward` is run under a
`TorchFunctionMode`, as torch offers for that, which sees the call by whatever name it is made.
`callers` finds such modules by one small call of the model. A compiled model breaks its graph here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from accel.geometry import Site
from accel.how import How
from accel.intercept import REDUCE, Taken, copy_plainly
from accel.router import Session

__all__ = ["CallInterception", "callers"]

SDPA = F.scaled_dot_product_attention
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class CallInterception:
    """The SDPA calls of some modules of one model. `undo` puts every one back as it was."""

    def __init__(self, session: Session, modules: dict[Site, nn.Module]) -> None:
        self._modules = list(modules.values())
        self._taken = []
        # offloading also puts a forward on the module itself
        self._before = [module.__dict__.get("forward") for module in self._modules]
        for site, module in modules.items():
            taken = Taken(session, site, module)
            self._taken.append(taken)
            own = module.forward
            module.__dict__["forward"] = torch.compiler.disable(partial(_forward, taken, own))
            copy_plainly(module, "forward")

    def serve(self, session: Session) -> None:
        """Hand the sites to another session."""
        for taken in self._taken:
            taken.session = session

    def undo(self) -> None:
        for module, before in zip(self._modules, self._before, strict=True):
            module.__dict__.pop("forward", None)
            module.__dict__.pop(REDUCE, None)
            if before is not None:
                module.__dict__["forward"] = before

    @property
    def intact(self) -> bool:
        """Whether every module is still called as it was taken."""
        return all("forward" in module.__dict__ for module in self._modules)


def _forward(taken: Taken, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Calls(partial(_attend, taken)):
        return own(*args, **kwargs)


def _attend(taken: Taken, call: dict[str, Any], own: Callable[[], Tensor]) -> Tensor:
    q, k, v = (call[name] for name in ARGUMENTS[:3])
    how = How(
        call.get("attn_mask"),
        call.get("dropout_p", 0.0),
        call.get("is_causal", False),
        call.get("scale"),
        q.shape[1] != k.shape[1],
    )
    return taken.attend(q, k, v, how, False, own)


class _Calls(TorchFunctionMode):
    """Hands every SDPA call, by its arguments' names, to `see` with what would make it."""

    def __init__(self, see: Callable[[dict[str, Any], Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        call = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        return self._see(call, lambda: func(*args, **kwargs))


def callers(model: nn.Module, call: Callable[[], Any]) -> dict[str, tuple[int, int]]:
    """(query heads, head dim) of the modules that call SDPA once, as self-attention, in `call`."""
    running: list[str] = []
    seen: dict[str, list[tuple[int, int] | None]] = {}

    def see(found: dict[str, Any], own: Callable[[], Tensor]) -> Tensor:
        q, k = found["query"], found["key"]
        square = q.ndim == 4 and q.shape[2] == k.shape[2]
        seen.setdefault(running[-1] if running else "", []).append(
            (q.shape[1], q.shape[3]) if square else None
        )
        return own()

    with _following(model, running), _Calls(see):
        call()
    return {
        name: calls[0]
        for name, calls in seen.items()
        if name and len(calls) == 1 and calls[0] is not None
    }


@contextmanager
def _following(model: nn.Module, running: list[str]) -> Iterator[None]:
    """While the context is open `running` ends with the name of the module that runs."""
    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(lambda m, a, name=name: running.append(name)),
            module.register_forward_hook(lambda m, a, o: (running.pop(), None)[1]),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
