"""What a report marks in texts, and its table of the kinds of tasks."""

from accel.pipelines.report_text import by_task, marked
from accel.pipelines.tasks import Task

TASK = Task("1", "copy", "copy\n", "begin <a>\nx=1\n\nx=1\ny=2\nend <a>\n", ("x=1", "x=1", "y=2"))


def test_the_right_answer_has_nothing_wrong():
    found = marked(TASK.answer, TASK)
    assert found.splitlines() == [
        "begin &lt;a&gt;",
        "<b>x=1</b>",
        "",
        "<b>x=1</b>",
        "<b>y=2</b>",
        "end &lt;a&gt;",
    ]


def test_wrong_lines_and_missing_values_are_marked():
    found = marked("x=1\nx=<3>\nbegin <a>\nbegin <a>", TASK).splitlines()
    assert found == [
        "<b>x=1</b>",
        "<mark>x=&lt;3&gt;</mark>",
        "begin &lt;a&gt;",
        "<mark>begin &lt;a&gt;</mark>",
        "<del>x=1</del>",
        "<del>y=2</del>",
    ]


def test_a_line_more_often_than_asked_is_wrong():
    assert marked("y=2\ny=2", TASK).splitlines()[:2] == ["<b>y=2</b>", "<mark>y=2</mark>"]


def test_accuracy_by_task_stands_beside_dense():
    arms = {
        "dense": {"accuracy_by_task": {"copy": 0.5, "recall": 1.0}},
        "sparsed": {"accuracy_by_task": {"copy": 0.25, "recall": 1.0}},
        "broken": {"accuracy_by_task": {}},
    }
    page = by_task({"arms": arms})
    assert "<td>25.0% <i>-25.0</i></td><td>100.0%</td>" in page
    assert "broken" not in page
    assert by_task({"arms": {"dense": {"accuracy_by_task": {"copy": 0.5}}}}) == ""
