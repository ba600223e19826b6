"""Texts: tokens, judged by their tasks, by dense, and by how likely they are under the model."""

import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel.decoding import Decoding
from accel.errors import AccelError
from accel.files import write_atomically
from accel.pipelines.frames_output import spanned
from accel.pipelines.output import Judged, Output
from accel.pipelines.paths import find_path
from accel.pipelines.tasks import Task, by_turns, read_tasks
from accel.pipelines.text_columns import PICTURES, SPEED, quality_columns
from accel.pipelines.video_files import EXTENSIONS
from accel.recipes import Recipe
from accel.untrusted import check_whole

__all__ = ["Text", "TextOutput"]

# of a call, what a plan with a decoding decides
DECIDED = (*Decoding.__dataclass_fields__, "num_inference_steps")
WARM_BLOCKS = 2


@dataclass(frozen=True)
class Text:
    """A generated text. calls: of the model, for all of it; loss: under dense, of a kept one."""

    tokens: NDArray[np.int64]
    text: str
    calls: int
    loss: float | None = None


class TextOutput(Output):
    """Texts of a masked diffusion language model (`MaskedDiffusionPipeline`)."""

    name = "text"
    one, many = "text", "texts"
    code = ("dllm", "text_loss", "text_models")
    caches = False
    priced = False
    mapped = False
    pictures = PICTURES
    quality = PICTURES[0].quality
    told = ("accuracy", "task", "agreement", "loss")
    columns_of_speed = SPEED
    measured = (
        "Accuracy is the share of what a task asks for that stands in the text, a line for each;"
        " agreement is the share of tokens that dense has at the same place; the loss is that of"
        " the generated tokens under the dense model, of which every other one is masked at a time."
    )
    output_type = "text"

    def check(self, config: Any) -> None:
        check_whole("model.call.gen_length", config.call.get("gen_length"), 1)
        for name in ("block_length", "num_inference_steps"):
            if config.call.get(name) is not None:
                check_whole(f"model.call.{name}", config.call[name], 1)

    def asked(self, config: Any, name: str) -> tuple[str, ...]:
        path = {"prompts": config.tasks, "calibration": config.calibration_tasks}[name]
        return tuple(task.prompt for task in by_turns(read_tasks(path))) if path else ()

    def serves(self, recipe: Recipe) -> bool:
        return recipe.text

    def steps(self, call: Mapping[str, Any]) -> int:
        return int(call.get("num_inference_steps") or call["gen_length"])

    def shortened(self, call: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Two blocks of so many steps each: caches are filled and used in every one."""
        block = min(call.get("block_length") or call["gen_length"], call["gen_length"])
        blocks = min(WARM_BLOCKS, -(-call["gen_length"] // block))
        return {
            "gen_length": min(call["gen_length"], blocks * block),
            "num_inference_steps": blocks * steps,
        }

    def call(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        from accel.pipelines.enable import plan_of

        plan = plan_of(pipe.model)
        if plan is None or plan.decoding is None:
            return dict(call)
        return {name: value for name, value in call.items() if name not in DECIDED}

    def read(self, made: Any) -> Text:
        tokens = made.sequences[0].cpu().numpy()
        return Text(tokens, "" if made.texts is None else made.texts[0], made.calls)

    def dense_steps(self, schedule: Any, steps: int) -> list[bool]:
        return []

    def place(self, session: Any, steps: int) -> None:
        return None  # prompts differ in length

    def counts(self, generation: Text) -> dict[str, Any]:
        return {"tokens": len(generation.tokens), "calls": generation.calls}

    def save(self, path: Path, generation: Text, host: Any, prompt: str) -> None:
        from accel.pipelines.text_loss import dense_loss

        templated = host.config.call.get("use_chat_template", True)
        tokens = torch.from_numpy(generation.tokens)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            tokens=generation.tokens,
            text=np.frombuffer(generation.text.encode(), np.uint8),
            calls=generation.calls,
            loss=dense_loss(host.pipe, prompt, tokens, templated),
        )
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> Text:
        with np.load(path, allow_pickle=False) as file:
            text = file["text"].tobytes().decode()
            return Text(file["tokens"], text, int(file["calls"]), float(file["loss"]))

    def judges(self, config: Any) -> str:
        path = Path(find_path(config.tasks)) if config.tasks else None
        content = path.read_bytes() if path is not None and path.is_file() else b""
        return hashlib.sha256(content).hexdigest()[:16]

    def judge(self, config: Any) -> dict[str, Task]:
        if not config.tasks:
            return {}
        return {task.prompt: task for task in read_tasks(config.tasks)}

    def judged(
        self, generation: Text, dense: Text | None, prompt: str, judge: Mapping[str, Task]
    ) -> dict[str, Any]:
        task = judge.get(prompt)
        return {
            "task": None if task is None else task.task,
            "accuracy": None if task is None else task.score(generation.text),
            "agreement": None if dense is None else agreement(generation.tokens, dense.tokens),
            "loss": generation.loss,
        }

    def results(
        self, found: Judged, dense: Judged, records: Mapping[int, Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        judged = [q for q in found if q is not None]
        losses = [q["loss"] for q in judged if q["loss"] is not None]
        by_task: dict[str, list[float]] = defaultdict(list)
        for quality in judged:
            if quality["accuracy"] is not None:
                by_task[quality["task"]].append(quality["accuracy"])
        scores = [score for scores in by_task.values() for score in scores]

        def middle(of: Any) -> float | None:
            """Median over prompts of the median over what was measured of each."""
            found = [median(map(of, made)) for made in records.values() if made]
            return float(median(found)) if found else None

        done = [record for made in records.values() for record in made]
        caches = [r["summary"].get("cache_bytes", 0) for r in done if r["summary"]]
        return {
            "tokens_per_second": middle(lambda r: r["tokens"] / r["seconds"]),
            "calls": middle(lambda r: r["calls"]),
            "call_seconds": middle(lambda r: r["seconds"] / r["calls"]),
            "cache_bytes": max(caches, default=0) or None,
            "accuracy": mean(scores) if scores else None,
            "accuracy_by_task": {task: mean(made) for task, made in sorted(by_task.items())},
            "agreement": spanned(judged, "agreement"),
            "loss": mean(losses) if losses else None,
        }

    def columns_of_quality(self, arms: Mapping[str, Any]) -> Any:
        return quality_columns(arms)

    def words(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        call = settings["call"]
        block = call.get("block_length")
        blocks = f" in blocks of {block}" if block else ""
        return (f"{call['gen_length']} tokens{blocks}",)

    def prompts_in_words(self, prompts: Sequence[str]) -> str:
        least, most = min(map(len, prompts)), max(map(len, prompts))
        return f"{len(prompts)}, of {least:,} to {most:,} characters"

    def tiles(self, arm: Mapping[str, Any]) -> list[tuple[str, str]]:
        tiles = []
        if arm.get("tokens_per_second"):
            tiles.append((f"{arm['tokens_per_second']:.1f}", "tokens a second"))
        if arm.get("accuracy") is not None:
            tiles.append((f"{arm['accuracy']:.0%}", "of what tasks ask for is right"))
        if arm.get("agreement"):
            tiles.append((f"{arm['agreement']['mean']:.0%}", "of tokens as dense has them"))
        return tiles

    def sections(self, folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
        from accel.pipelines.report_text import by_task, texts

        return [by_task(results), *texts(folder, results, shown)]

    def checked_path(self, out: str | None) -> Path | None:
        if out is None:
            return None
        path = Path(out)
        if path.suffix.lower() in EXTENSIONS or path.is_dir():
            raise AccelError(f"no text can be written to {out!r}; write 'text.txt' instead")
        return path

    def write(self, path: Path | None, generation: Text, *, fps: int | float, min_side: int) -> str:
        if path is not None:
            write_atomically(path, generation.text)
        where = "" if path is None else f"{path}: "
        return (
            f"{generation.text}\n{where}{len(generation.tokens)} tokens in"
            f" {generation.calls} calls of the model"
        )


def agreement(tokens: NDArray[np.int64], dense: NDArray[np.int64]) -> float:
    """The share of places at which two generations have the same token."""
    both = min(len(tokens), len(dense))
    return float((tokens[:both] == dense[:both]).sum() / max(len(tokens), len(dense)))
