"""The script that trains connectivity predictors."""

import sys

import pytest
import torch
from tiny_vit import build
from train_connectivity import batches_of, main

from accel.plan import Plan


def test_images_without_a_folder_are_digits():
    model = build("vit_tiny_patch16_224", 3, 3)
    first, second = batches_of(model, None, 48, 2, 5, 2)
    assert first.shape == (2, 3, 48, 48)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second)
    (again,) = batches_of(model, None, 48, 2, 7, 1)
    assert torch.equal(second, again)


@pytest.mark.slow
def test_it_writes_a_plan(tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan.json"
    words = ["--model", "test_vit", "--size", "160", "--batches", "3", "--block", "16", "16"]
    monkeypatch.setattr(sys, "argv", ["train", *words, "--out", str(out)])
    main()
    assert "connectivity" in capsys.readouterr().out
    plan = Plan.load(out)
    assert plan.block == (16, 16)
    assert plan.wants_sparse
