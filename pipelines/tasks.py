"""Tasks of a text model: prompts whose right answers are known, as a file of JSON lines.

{"id": "7", "task": "needle", "prompt": "...", "answer": "...", "values": ["key vemo=4821"]}
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from accel.errors import AccelError
from accel.pipelines.paths import find_path
from accel.untrusted import refuse_constant, table, typed

__all__ = ["Task", "by_turns", "read_tasks"]

KEYS = {"id", "task", "prompt", "answer", "values"}


@dataclass(frozen=True, slots=True)
class Task:
    """task: what kind it is. values: the lines of the answer that count, in its order."""

    id: str
    task: str
    prompt: str
    answer: str
    values: tuple[str, ...]

    def score(self, text: str) -> float:
        """The share of the values that are lines of `text`, each as often as it is asked for."""
        right = Counter(self.values) & Counter(text.splitlines())
        return right.total() / len(self.values)


def read_tasks(path: str) -> tuple[Task, ...]:
    """The tasks of a file below the current directory or the checkout, as untrusted input."""
    file = Path(find_path(path))
    if not file.is_file():
        raise AccelError(f"tasks: there is no file {path!r}")
    tasks = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            tasks.append(_task(f"{path}, line {number}", line))
    if not tasks:
        raise AccelError(f"tasks: {path!r} has none")
    return tuple(tasks)


def by_turns(tasks: Iterable[Task]) -> list[Task]:
    """The tasks with their kinds by turns, so that the first ones are of every kind."""
    kinds: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        kinds[task.task].append(task)
    rounds = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [task for together in rounds for task in together if task is not None]


def _task(what: str, line: str) -> Task:
    try:
        data = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AccelError(f"{what} is not JSON: {error}") from error
    found = table(what, data, None, KEYS)
    texts = {name: typed(f"{what}: {name}", found[name], str) for name in KEYS - {"values"}}
    values = typed(f"{what}: values", found["values"], list)
    if not values or any(not isinstance(value, str) or not value for value in values):
        raise AccelError(f"{what}: values is {values!r:.80}; it is a list of texts")
    if not texts["prompt"].strip():
        raise AccelError(f"{what} has no prompt")
    return Task(values=tuple(values), **texts)
