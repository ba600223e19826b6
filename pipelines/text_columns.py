"""What tables and pictures say of texts: tokens a second, calls, accuracy, agreement, loss."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from accel.pipelines.measures import Column, Measure, Quality, above_front, number
from accel.pipelines.output import Picture

__all__ = ["PICTURES", "SPEED", "quality_columns"]


def _percent(name: str, key: str | None, arm: Mapping[str, Any]) -> float | None:
    found = arm.get(name)
    if key is not None:
        found = (found or {}).get(key)
    return None if found is None else 100 * found


def _none(arm: Mapping[str, Any]) -> None:
    return None


ACCURACY = Quality(
    label="of what tasks ask for that is right (percent)",
    of=partial(_percent, "accuracy", None),
    worst=_none,  # of a task that asks for one value it is 0 or 100
    name="accuracy",
    short="accuracy",
    unit="points of accuracy",
    floor=0.0,
    cap=100.0,
)
AGREEMENT = Quality(
    label="tokens that are as dense has them (percent)",
    of=partial(_percent, "agreement", "mean"),
    worst=partial(_percent, "agreement", "worst"),
    name="agreement",
    short="agreement",
    unit="points of agreement",
    floor=0.0,
    cap=100.0,
)
TOKENS = Measure("tokens a second", lambda arm: arm.get("tokens_per_second"))
PICTURES = (
    Picture("trade-off.svg", TOKENS, ACCURACY, "A mark is the mean over all tasks."),
    Picture(
        "agreement.svg",
        TOKENS,
        AGREEMENT,
        "A mark is the mean over all texts, the whisker goes down to the one that is least like"
        " dense's. Once a token differs, those after it may well: a text that is as right may agree"
        " little.",
    ),
)
SPEED = (
    Column(
        "tokens/s",
        "generated tokens over the seconds of a generation, prompt included: median over prompts",
        number("{:.1f}", "tokens_per_second"),
    ),
    Column(
        "calls",
        "calls of the model in a generation: median over prompts",
        number("{:.0f}", "calls"),
    ),
    Column(
        "ms a call",
        "seconds of a generation over its calls: median over prompts",
        number("{:.1f}", "call_seconds", times=1000.0),
    ),
    Column(
        "cache MiB",
        "the most that the keys and values took which are kept between calls",
        number("{:.1f}", "cache_bytes", times=2**-20),
    ),
)


def quality_columns(arms: Mapping[str, Any]) -> tuple[Column, ...]:
    """Accuracy, of all tasks and of every kind of task there is; agreement and loss."""
    tasks = sorted({task for arm in arms.values() for task in arm.get("accuracy_by_task") or ()})
    several = tasks if len(tasks) > 1 else []
    return (
        Column(
            "accuracy",
            "share of what the tasks ask for that stands in the text, in the mean over tasks",
            number("{:.1%}", "accuracy"),
        ),
        *(
            Column(
                task, f"accuracy of the tasks {task!r}", number("{:.1%}", "accuracy_by_task", task)
            )
            for task in several
        ),
        Column(
            "front points",
            "what the (first) front is worth at the measured time of this arm, above this arm's"
            " accuracy, in points: linear between those of its points that no other beats",
            above_front,
        ),
        Column(
            "agreement",
            "share of tokens that dense has at the same place, in the mean over texts",
            number("{:.1%}", "agreement", "mean"),
        ),
        Column(
            "loss",
            "mean negative log-likelihood of the generated tokens under the dense model, in nats;"
            " half of them are masked at a time",
            number("{:.3f}", "loss"),
        ),
    )
