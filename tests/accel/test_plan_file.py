"""Block sets beside a plan file: what is written, and what of it is believed."""

import hashlib
import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny_denoiser import BLOCK, GRID, SITES, tiny_plan

from accel import plan_file
from accel.blocking import Blocking
from accel.choice import DENSE, Choice
from accel.errors import PlanError
from accel.layout import Layout
from accel.pattern import Window
from accel.pattern_blocks import Blocks
from accel.pattern_union import Union
from accel.plan import Plan


def blocks(seed=0, order="thw"):
    blocking = Blocking(Layout.of(GRID), order, BLOCK)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(blocking.q_blocks, blocking.kv_blocks, generator=generator) < 0.4
    return Blocks.of(keep, blocking)


def plan_with_sets():
    return tiny_plan(
        Choice(blocks(0)),
        Choice(blocks(1, "hwt"), order="hwt", rest="mean"),
        Choice(Union((Window(t=0), blocks(0)))),
    )


class TestWriting:
    def test_sets_lie_beside_the_plan_once_each(self, tmp_path):
        plan = plan_with_sets()
        path = plan.save(tmp_path / "plan.json")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
        data = json.loads(path.read_text())
        content = (tmp_path / "plan.safetensors").read_bytes()
        assert data["sets"] == {
            "file": "plan.safetensors",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        vectors = safetensors.numpy.load(content)
        assert {k: v.tobytes() for k, v in vectors.items()} == {
            "0": blocks(0).bits,
            "1": blocks(1, "hwt").bits,
        }
        assert [c["select"].get("bits") for c in data["choices"]] == [0, 1, None]
        assert data["choices"][2]["select"]["parts"][1]["bits"] == 0
        assert Plan.load(path) == plan
        assert Plan.load(path).digest == plan.digest

    def test_a_plan_without_sets_writes_no_second_file(self, tmp_path):
        path = tiny_plan(DENSE).save(tmp_path / "plan.json")
        assert list(tmp_path.iterdir()) == [path]
        assert "sets" not in json.loads(path.read_text())

    def test_a_table_holds_everything_itself(self):
        plan = plan_with_sets()
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    def test_a_file_that_holds_everything_itself_is_read(self, tmp_path):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan_with_sets().to_dict()))
        assert Plan.load(path) == plan_with_sets()

    def test_the_digest_covers_the_sets(self):
        assert tiny_plan(Choice(blocks(0))).digest != tiny_plan(Choice(blocks(1))).digest

    @pytest.mark.parametrize("name", ["wan-0.5", "a b (1).json", "ünder.json"])
    def test_names_of_files(self, tmp_path, name):
        assert Plan.load(plan_with_sets().save(tmp_path / name)) == plan_with_sets()
        other = tiny_plan(Choice(blocks(2)))
        other.save(tmp_path / "wan-0.7")
        assert Plan.load(tmp_path / name) == plan_with_sets(), "each has its own sets"

    def test_a_name_that_could_not_be_read_again_is_refused(self, tmp_path):
        with pytest.raises(PlanError, match=r"sets.file is '\.hidden\.safetensors'"):
            plan_with_sets().save(tmp_path / ".hidden.json")
        assert not list(tmp_path.iterdir())

    def test_a_failing_write_leaves_no_half(self, tmp_path, monkeypatch):
        path = plan_with_sets().save(tmp_path / "plan.json")
        before = path.read_bytes(), (tmp_path / "plan.safetensors").read_bytes()
        with pytest.raises(PlanError, match="not finite"):
            tiny_plan(Choice(blocks(3)), provenance={"psnr": float("nan")}).save(path)
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            tiny_plan(Choice(blocks(3))).save(path)
        assert (path.read_bytes(), (tmp_path / "plan.safetensors").read_bytes()) == before

    def test_too_much_is_not_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_file, "MAX_SET_BYTES", 64)
        with pytest.raises(PlanError, match=r"the block sets have \d+ bytes, over 64"):
            plan_with_sets().save(tmp_path / "plan.json")


def test_another_grid_keeps_the_sets():
    plan = plan_with_sets()
    other = plan.for_grid((5, 4, 6))
    assert other.sites == plan.sites
    mask = other.choices(SITES[0], 0)[0].select.mask(Blocking(Layout.of((5, 4, 6)), "thw", BLOCK))
    assert mask.shape == (4, 8)
    assert mask.any(1).all()


def _name(value):
    return lambda folder, data: data["sets"].update(file=value)


def _rewritten(vectors):
    def change(folder, data):
        content = safetensors.numpy.save(vectors)
        _content(content)(folder, data)

    return change


def _content(content):
    def change(folder, data):
        (folder / "plan.safetensors").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        data["sets"].update(bytes=len(content), sha256=sha256)

    return change


def _cut(folder, data):
    path = folder / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _flipped(folder, data):
    path = folder / "plan.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ZEROS = np.zeros(4, np.uint8)
BAD = {
    "another file": (_flipped, "are not those it was saved with; fetch both"),
    "cut short": (_cut, "bytes, not 128; fetch both files"),
    "missing": (lambda f, d: (f / "plan.safetensors").unlink(), "are not beside it"),
    "a folder": (
        lambda f, d: ((f / "plan.safetensors").unlink(), (f / "plan.safetensors").mkdir()),
        "are not beside it",
    ),
    **{
        f"a path {value!r}": (_name(value), f"sets.file is {value!r:.80}")
        for value in (
            "../plan.safetensors",
            "/etc/plan.safetensors",
            "a\\plan.safetensors",
            "c:plan.safetensors",
            "a\0.safetensors",
            "plan.json",
            ".safetensors",
            "",
            "a" * 300 + ".safetensors",
        )
    },
    "a name that is none": (_name(3), "sets.file must be of type str"),
    "sets a list": (lambda f, d: d.update(sets=[]), "sets must be a table, got list"),
    "sets without a hash": (lambda f, d: d["sets"].pop("sha256"), "sets lacks the key 'sha256'"),
    "unknown key": (lambda f, d: d["sets"].update(sha=1), "did you mean 'sha256'"),
    "a hash a number": (
        lambda f, d: d["sets"].update(sha256=3),
        "sets.sha256 must be of type str",
    ),
    "too large": (
        lambda f, d: d["sets"].update(bytes=plan_file.MAX_SET_BYTES + 1),
        "block sets have at most",
    ),
    "size 0": (lambda f, d: d["sets"].update(bytes=0), "sets.bytes is 0"),
    "size a switch": (lambda f, d: d["sets"].update(bytes=True), "must be of type int"),
    "no safetensors": (_content(b"nothing of the kind"), "cannot be read"),
    "a huge header": (_content(b"\xff" * 8 + b"{}"), "cannot be read"),
    "a pickle": (_content(b"\x80\x04\x95" * 20), "cannot be read"),
    "another dtype": (
        _rewritten({"0": ZEROS.astype(np.int64), "1": ZEROS}),
        "block set 0 is int64 (4,), not a vector of uint8",
    ),
    "another shape": (
        _rewritten({"0": ZEROS, "1": ZEROS[None]}),
        "block set 1 is uint8 (1, 4), not a vector",
    ),
    "too short a set": (_rewritten({"0": ZEROS[:3], "1": ZEROS}), "has 4 bytes, got 3"),
    "a set that is not there": (_rewritten({"0": ZEROS}), "bits name the block set 1; the file"),
    "a number that is none": (
        lambda f, d: d["choices"][0]["select"].update(bits=-1),
        "bits name the block set -1",
    ),
    "bits a table": (
        lambda f, d: d["choices"][0]["select"].update(bits={}),
        "bits name the block set {}",
    ),
    "choices a number": (lambda f, d: d.update(choices=3), "choices must be of type list"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_is_not_believed(tmp_path, change, message):
    path = plan_with_sets().save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    change(tmp_path, data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_sets_nested_without_end(tmp_path):
    path = plan_with_sets().save(tmp_path / "plan.json")
    data = json.loads(path.read_text())
    data["choices"].append("HERE")
    nested = '{"a":' * 900 + "1" + "}" * 900
    path.write_text(json.dumps(data).replace('"HERE"', nested))
    with pytest.raises(PlanError):
        Plan.load(path)


def test_numbers_without_sets_are_refused():
    data = plan_with_sets().to_dict()
    data["choices"][0]["select"]["bits"] = 0
    with pytest.raises(PlanError, match="bits is a text, got 0"):
        Plan.from_dict(data)
