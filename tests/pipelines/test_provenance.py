"""What names a measurement: the libraries, and all the code that it depends on."""

import pytest
import torch

from accel.pipelines import compare_book
from accel.pipelines.outputs import OUTPUTS
from accel.pipelines.provenance import code_digest, device_name, versions


def test_versions_are_those_of_what_is_installed():
    found = versions("no-such-distribution")
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["no-such-distribution"] == "not installed"


def test_a_processor_is_named_with_its_threads():
    assert device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")


@pytest.mark.parametrize("change", ["content", "file", "no code"])
def test_the_digest_is_that_of_the_code(change, tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("1")
    second.write_text("2")
    before = code_digest(first)
    code_digest.cache_clear()
    assert before != code_digest()
    if change == "content":
        first.write_text("3")
        assert code_digest(first) != before
    elif change == "file":
        assert code_digest(first, second) != before
    else:
        (tmp_path / "a.txt").write_text("4")
        assert code_digest(first, tmp_path / "a.txt") == before
    code_digest.cache_clear()


def test_a_comparison_depends_on_what_runs_its_arms():
    files = [path for kind in OUTPUTS.values() for path in compare_book.code_of(kind)]
    names = {path.stem for path in compare_book.code_of(OUTPUTS["frames"])}
    assert names >= {
        "compare_arm",
        "host",
        "pricing",
        "calibration",
        "candidate_measures",
        "caches",
    }
    assert {path.stem for path in files} - names >= {"dllm", "text_host", "text_loss"}
    assert all(path.is_file() for path in files)
