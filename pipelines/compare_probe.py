"""How a comparison runs: in the precision, and on the dense setting, that is fastest here."""

import json
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
        # a model that has one step has no others to time
        step = probed["step_seconds"]["all"] if rest else 0.0
        found["seconds"][dtype] = probed["seconds"] + rest * step
    if not found["seconds"]:
        raise AccelError(f"the model runs in none of {dtypes}: {found['errors']}")
    found["chosen"] = min(found["seconds"], key=found["seconds"].__getitem__)
    return found


def fastest_dense(
    model: ModelConfig,
    settings: CompareSettings,
    folder: Path,
    sitting: str,
    launch: Launch,
) -> dict[str, Any]:
    """`fastest`: the baseline whose generation of the first prompt is the shortest, which smaller
    inputs are given to; with the times, which are kept in `folder`, and what failed.
    """
    found: dict[str, Any] = {"dense_seconds": {}, "dense_errors": {}}
    book = Book(folder / "dense", model, model.prompts, settings.seed, sitting)
    for arm in settings.dense_arms:
        probed = book.read(arm, "probe", 0)
        if probed is None:
            say(f"how fast is {arm.name}?")
            setup = json.loads(arm.setup) if arm.setup else {}
            spec = {"plan": arm.plan, "model": asdict(model), "setup": setup}
            worker = launch(book.arm_folder(arm), spec)
            command = {"do": "generate", "prompt": model.prompts[0], "seed": settings.seed}
            try:
                worker.ask({"do": "start"}, settings.arms_timeout_s)
                answer = worker.ask(command, settings.arms_timeout_s)
            except ArmFailed as error:
                found["dense_errors"][arm.name] = str(error)
                continue
            finally:
                worker.close()
            probed = book.write(arm, "probe", answer, 0)
        found["dense_seconds"][arm.name] = probed["seconds"]
    times = found["dense_seconds"]
    if not times:
        raise AccelError(f"no baseline runs: {found['dense_errors']}")
    return {"fastest": min(times, key=times.__getitem__), **found}


def say(what: str) -> None:
    """Tell the user what is going on, above the progress bar."""
    tqdm.write(what, file=sys.stderr)
