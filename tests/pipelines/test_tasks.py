"""Tasks of text models: how they are read, and what counts as right."""

import json

import pytest

from accel.errors import AccelError
from accel.pipelines.tasks import Task, by_turns, read_tasks

LINE = {"id": "1", "task": "recall", "prompt": "key a=1\nfind\n", "answer": "a\n", "values": ["a"]}


def test_tasks_are_read_line_by_line(tmp_path, monkeypatch):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join([json.dumps(LINE), "", json.dumps({**LINE, "seed": 3})]))
    monkeypatch.chdir(tmp_path)
    one, two = read_tasks("tasks.jsonl")
    assert one == two == Task("1", "recall", LINE["prompt"], "a\n", ("a",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has none"),
        ("{", r"line 1 is not JSON"),
        (json.dumps(LINE) + "\n[]", "line 2 must be a table"),
        (json.dumps({k: v for k, v in LINE.items() if k != "answer"}), "lacks the key 'answer'"),
        (json.dumps({**LINE, "values": []}), r"values is \[\]; it is a list of texts"),
        (json.dumps({**LINE, "values": [1]}), "it is a list of texts"),
        (json.dumps({**LINE, "task": 1}), "task must be of type str"),
        (json.dumps({**LINE, "prompt": " "}), "line 1 has no prompt"),
    ],
)
def test_a_broken_file_says_where(tmp_path, content, message):
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(AccelError, match=message):
        read_tasks(str(path))


def test_a_missing_file_is_one_clear_error():
    with pytest.raises(AccelError, match=r"there is no file 'no.jsonl'"):
        read_tasks("no.jsonl")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a=1\nb=2\na=1\n", 1.0),
        ("b=2\na=1", 2 / 3),  # a line counts as often as it is there
        ("a=1 b=2", 0.0),
        ("a=12\nb=2", 1 / 3),
        ("", 0.0),
    ],
)
def test_the_share_of_values_that_are_lines_of_the_text(text, share):
    task = Task("1", "recall", "find", "", ("a=1", "b=2", "a=1"))
    assert task.score(text) == pytest.approx(share)


def test_the_first_tasks_are_of_all_kinds():
    tasks = [Task(f"{kind}{i}", kind, "p", "a", ("a",)) for kind in "abb" for i in range(2)]
    assert [task.id for task in by_turns(tasks)] == ["a0", "b0", "a1", "b1", "b0", "b1"]
