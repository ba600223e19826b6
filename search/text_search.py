"""The search for a text model: genomes of caches and decodings, judged by calibration tasks."""

from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from accel.errors import AccelError
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.tasks import by_turns, read_tasks
from accel.search.task_search import TaskSearch, TaskSettings
from accel.search.text_bench import TextBench

__all__ = ["TextSearch"]


class TextSearch(TaskSearch):
    """The search of one text model: a trial generates some tasks of each kind."""

    code: ClassVar[tuple[str, ...]] = (*TaskSearch.code, "text_bench", "text_genes", "text_search")

    def __init__(self, model: ModelConfig, settings: TaskSettings, folder: Path) -> None:
        if not model.calibration_tasks:
            raise AccelError(
                f"model {model.name!r} has no calibration_tasks, by whose answers plans are judged"
            )
        tasks = by_turns(read_tasks(model.calibration_tasks))
        some = len({task.task for task in tasks}) * settings.evolution.prompts
        told = {"answers": [asdict(task) for task in tasks]}
        super().__init__(Host(model), settings, folder, tasks, some, **told)

    def _bench(self) -> TextBench:
        return TextBench(self.host, self.folder, self.key, self.settings.seed)
