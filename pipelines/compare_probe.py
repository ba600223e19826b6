"""The precision in which a comparison runs: that in which dense is fastest on this device."""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from accel.errors import AccelError
from accel.pipelines.compare_arms import DENSE
from accel.pipelines.compare_book import Book
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_worker import ArmFailed
from accel.pipelines.host import ModelConfig

PROBE_STEPS = 4

# starts the process of an arm: from its folder and its specification to what takes its commands
Launch = Callable[[Path, dict[str, Any]], Any]


def fastest_dtype(
    model: ModelConfig,
    settings: CompareSettings,
    prompts: tuple[str, ...],
    folder: Path,
    sitting: str,
    launch: Launch,
) -> dict[str, Any]:
    """`chosen`: the one of the settings' precisions in which dense is fastest, from a few steps in
    each; with the times, which are kept in `folder`, and what failed. Empty without any to choose.

    Seconds are those of a whole generation: what is outside the steps, plus all of them.
    """
    dtypes = list(settings.dtypes)
    if len(dtypes) < 2:
        return {"chosen": dtypes[0]} if dtypes else {}
    found: dict[str, Any] = {"seconds": {}, "errors": {}}
    for dtype in dtypes:
        one = replace(model, dtype=dtype)
        book = Book(folder / dtype, one, prompts, settings.seed, sitting)
        probed = book.read(DENSE, "probe", 0)
        if probed is None:
            say(f"how fast is dense in {dtype}?")
            worker = launch(book.arm_folder(DENSE), {"plan": None, "model": asdict(one)})
            command = {"do": "generate", "prompt": prompts[0], "seed": settings.seed}
            try:
                worker.ask({"do": "start"}, settings.arms_timeout_s)
                answer = worker.ask({**command, "steps": PROBE_STEPS}, settings.arms_timeout_s)
            except ArmFailed as error:
                found["errors"][dtype] = str(error)
                continue
            finally:
                worker.close()
            probed = book.write(DENSE, "probe", answer, 0)
        rest = model.steps - probed["steps"]
        found["seconds"][dtype] = probed["seconds"] + rest * probed["step_seconds"]["all"]
    if not found["seconds"]:
        raise AccelError(f"the model runs in none of {dtypes}: {found['errors']}")
    found["chosen"] = min(found["seconds"], key=found["seconds"].__getitem__)
    return found


def say(what: str) -> None:
    """Tell the user what is going on, above the progress bar."""
    tqdm.write(what, file=sys.stderr)
