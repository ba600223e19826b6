"""What a plan promises, said before it is applied."""

import logging
from typing import Any

from torch import nn

from accel.pipelines.adapters import sites_of
from accel.pipelines.devices import execution_device
from accel.pipelines.provenance import device_name
from accel.plan import Plan

logger = logging.getLogger("accel")


def promise(plan: Plan) -> str | None:
    """The speed-up that was measured or predicted of `plan`, and where; None for neither."""
    told = [f"{times:.2f}x {word}" for word, times in _speedups(plan).items()]
    if not told:
        return None
    made = plan.made_at
    where = [
        made.device_name or made.device,
        made.dtype,
        None if made.grid is None else "grid {}x{}x{}".format(*made.grid),
        None if made.steps is None else f"{made.steps} steps",
    ]
    place = ", ".join(word for word in where if word)
    at = f" ({place})" if place else ""
    return f"plan {plan.name!r}: speed-up of a whole generation {', '.join(told)}{at}"


def announce(plan: Plan, target: Any, model: nn.Module) -> None:
    """Log the speed-up that was predicted or measured of `plan`, and where.

    A plan that promises to be slower than dense is a warning. So is one that was priced on another
    device or for another precision than the model's: which of dense and sparse attention is faster
    changes with both. target: what was given to `enable`, a pipeline or the model itself.
    """
    told = promise(plan)
    if told is None:
        return
    logger.info("%s", told)
    word, times = next(iter(_speedups(plan).items()))
    if times < 1:
        logger.warning(
            "plan %r makes a generation slower than the host's dense attention does: %.2fx %s; run"
            " without it, or make a plan here with accel-search",
            plan.name,
            times,
            word,
        )
    for what, then, now in _moved(plan, target, model):
        logger.warning(
            "plan %r was priced %s %s, and this model is %s %s: it may be slower than predicted;"
            " make a plan here with accel-search",
            plan.name,
            what,
            then,
            what,
            now,
        )


def _speedups(plan: Plan) -> dict[str, float]:
    """What was measured goes before what was predicted."""
    names = {"measured": "measured_speedup", "predicted": "speedup"}
    return {w: plan.expected[name] for w, name in names.items() if name in plan.expected}


def _moved(plan: Plan, target: Any, model: nn.Module) -> list[tuple[str, str, str]]:
    """What is not as it was when the plan was priced: (in or on, then, now)."""
    made, found = plan.made_at, []
    weights = [p for m in sites_of(model).values() for p in m.parameters() if p.is_floating_point()]
    # a pipeline that keeps its models elsewhere until they are called knows where it will run
    device = getattr(target, "_execution_device", None) or execution_device(model)
    if made.device is not None and made.device != device.type:
        found.append(("on", made.device_name or made.device, device.type))
    elif made.device_name not in (None, device_name(device)):
        found.append(("on", str(made.device_name), device_name(device)))
    dtype = str(weights[0].dtype).removeprefix("torch.") if weights else None
    if None not in (dtype, made.dtype) and dtype != made.dtype:
        found.append(("in", str(made.dtype), str(dtype)))
    return found
