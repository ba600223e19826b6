"""The sections of a report that show texts: every arm's beside what was asked, and a table of the
kinds of tasks.
"""

from collections import Counter
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from accel.pipelines.outputs import output_of
from accel.pipelines.report_parts import section
from accel.pipelines.tasks import Task, read_tasks

__all__ = ["by_task", "marked", "texts"]

TAIL_LINES, TAIL_CHARACTERS = 12, 900
SHOWN = 4  # texts of one report


def by_task(results: Mapping[str, Any]) -> str:
    """Accuracy of every arm by the kind of task; nothing where there is only one."""
    arms = {n: a["accuracy_by_task"] for n, a in results["arms"].items() if a["accuracy_by_task"]}
    tasks = sorted({task for found in arms.values() for task in found})
    if len(tasks) < 2:
        return ""
    dense = arms.get("dense", {})
    rows = []
    for name, found in arms.items():
        cells = "".join(f"<td>{_share(found.get(t), dense.get(t))}</td>" for t in tasks)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    return section(
        "Accuracy by task",
        f"<div class=wide><table><thead><tr><th>arm</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p>The share of what is asked for that is right, and how many points that is above or"
        " below dense.</p>",
    )


def _share(found: float | None, dense: float | None) -> str:
    if found is None:
        return "-"
    apart = "" if dense in (None, found) else f" <i>{100 * (found - dense):+.1f}</i>"
    return f"{found:.1%}{apart}"


def texts(folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
    """A section for some prompts: of every kind of task the one in which the shown arm is worst."""
    path = results["settings"].get("tasks") or ""
    known = {task.prompt: task for task in read_tasks(path)} if path else {}
    return [_text(folder, results, prompt, known) for prompt in _chosen(results["arms"][shown])]


def _chosen(arm: Mapping[str, Any]) -> list[int]:
    """The prompts to show: of each kind the one with the least accuracy, then agreement."""
    made = {n: t for n, t in enumerate(arm.get("texts", ())) if t}

    def badness(number: int) -> tuple[float, float, int]:
        one = made[number]
        scores = (one["accuracy"], one["agreement"])
        right, alike = (1.0 if score is None else score for score in scores)
        return right, alike, number

    worst: dict[Any, int] = {}
    for number in sorted(made, key=badness):
        worst.setdefault(made[number]["task"], number)
    return sorted(worst.values())[:SHOWN]


def _text(folder: Path, results: Mapping[str, Any], prompt: int, known: Mapping[str, Task]) -> str:
    asked = results["settings"]["prompts"][prompt]
    task, kind = known.get(asked), output_of(results["settings"]["output"])
    answers = []
    for name, arm in results["arms"].items():
        made = arm.get("texts", [])
        one = made[prompt] if prompt < len(made) else None
        if one is None:
            continue
        text = kind.load(folder / one["file"]).text
        body = escape(text) if task is None else marked(text, task)
        answers.append(
            f"<figure class=answer><figcaption>{escape(name)}<span>{_scores(one)}</span>"
            f"</figcaption><pre>{body}</pre></figure>"
        )
    name = f"Prompt {prompt + 1}" if task is None else f"Prompt {prompt + 1}: {task.task}"
    right = (
        ""
        if task is None
        else f"<h3>What is right</h3><pre class=quiet>{escape(task.answer)}</pre>"
    )
    return section(
        name,
        f"<h3>The end of the prompt ({len(asked):,} characters)</h3>"
        f"<pre class=quiet>{_tail(asked)}</pre>{right}"
        "<h3>Answers</h3><p>Marked: lines that were asked for, <mark>lines that were not</mark>,"
        f" and <del>what is missing</del>.</p><div class=answers>{''.join(answers)}</div>",
    )


def _scores(one: Mapping[str, Any]) -> str:
    told = [("right", one["accuracy"]), ("as dense", one["agreement"])]
    return " · ".join(f"{share:.0%} {what}" for what, share in told if share is not None)


def _tail(prompt: str) -> str:
    """The last lines of a prompt; what was left out is marked."""
    tail = "\n".join(prompt.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]
    return ("" if tail == prompt.rstrip("\n") else "…\n") + escape(tail)


def marked(text: str, task: Task) -> str:
    """The text as HTML: lines that are asked for in bold, those that neither count nor stand in the
    answer marked as wrong, and below them the values that are missing.
    """
    left = Counter(task.values)
    beside = Counter(task.answer.splitlines()) - left  # lines of the answer that do not count
    lines = []
    for line in text.splitlines():
        if left[line]:
            left[line] -= 1
            lines.append(f"<b>{escape(line)}</b>")
        elif beside[line] or not line.strip():
            beside[line] -= 1
            lines.append(escape(line))
        else:
            lines.append(f"<mark>{escape(line)}</mark>")
    lines += [f"<del>{escape(value)}</del>" for value in left.elements()]
    return "\n".join(lines)
