"""Weights of several runs are averaged into one folder."""

from pathlib import Path

import average_weights
import pytest
import torch
from safetensors.torch import load_file, save_file


def folder(path: Path, **weights: torch.Tensor) -> Path:
    (path / "model").mkdir(parents=True)
    save_file(weights, path / "model" / "model.safetensors")
    (path / "note.txt").write_text(path.name)
    return path


def test_the_mean_of_every_weight_with_the_first_ones_files(tmp_path: Path) -> None:
    weights = [torch.tensor([1.0, 2.0, 6.0], dtype=torch.bfloat16) * n for n in (1, 2, 6)]
    runs = [folder(tmp_path / str(n), w=w) for n, w in enumerate(weights)]
    average_weights.main(runs, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert torch.equal(found["w"], torch.tensor([3.0, 6.0, 18.0], dtype=torch.bfloat16))
    assert (tmp_path / "out" / "note.txt").read_text() == "0"
    average_weights.main(runs[:2], runs[1])  # into one of them
    assert load_file(runs[1] / "model" / "model.safetensors")["w"].tolist() == [1.5, 3.0, 9.0]
    assert (runs[1] / "note.txt").read_text() == "1"
    assert not list(tmp_path.rglob("*.part"))


def test_models_that_differ_are_refused(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "1", w=torch.ones(2)), folder(tmp_path / "2", w=torch.ones(3))
    with pytest.raises(SystemExit, match="of other shapes"):
        average_weights.main([one, other], tmp_path / "out")
    (other / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="do not have the same files"):
        average_weights.main([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
