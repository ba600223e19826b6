"""What was measured is read as untrusted input."""

import json
import re

import pytest

from accel.errors import AccelError
from accel.search.known import read_known

GOOD = {"plan": {"a task": {"seconds": 1.5, "score": 0}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be"),
        ({"plan": []}, "must be"),
        ({"plan": {"a task": {"seconds": 1.5}}}, "score"),
        ({"plan": {"a task": {"seconds": 1.5, "score": 0, "more": 1}}}, "no key 'more'"),
        ({"plan": {"a task": {"seconds": "1", "score": 0}}}, "'a task' has something that is not"),
        ({"plan": {"a task": {"seconds": float("nan"), "score": 0}}}, "NaN is not a number"),
    ],
)
def test_what_is_not_a_file_of_numbers(tmp_path, data, message):
    path = tmp_path / "known.json"
    path.write_text(json.dumps(GOOD))
    assert read_known(path, {"seconds", "score"}) == GOOD
    path.write_text(json.dumps(data))
    with pytest.raises(AccelError, match=re.escape(message)):
        read_known(path, {"seconds", "score"})
