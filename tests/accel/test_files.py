import os

import pytest

from accel.files import write_atomically


@pytest.mark.parametrize("content", ["new\n", b"\x00new"], ids=["text", "bytes"])
def test_a_file_is_replaced_whole(tmp_path, content):
    path = tmp_path / "below" / "file"
    assert write_atomically(path, "old") == path
    write_atomically(str(path), content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("broken", ["fdopen", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = write_atomically(tmp_path / "file", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
