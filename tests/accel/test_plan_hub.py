"""Plans as repositories of the hub: folders, cards, and what goes over the wire."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from test_plan_file import plan_with_sets
from tiny_denoiser import GRID, tiny_plan

from accel.choice import DENSE
from accel.errors import PlanError
from accel.made_at import MadeAt
from accel.plan import Plan
from accel.plan_card import card

EXPECTED = {
    "speedup": 2.4,
    "measured_speedup": 2.456,
    "measured_psnr": 31.18,
    "dense_seconds": 36.1,
    "steps": 30,
    "device": "cpu",
    "dtype": "float32",
}
PROVENANCE = {"device": "A processor, 2 threads", "call": {"num_inference_steps": 30}}


def measured(**changes):
    return tiny_plan(DENSE, grid=GRID, expected=EXPECTED, provenance=PROVENANCE, **changes)


class TestFolder:
    def test_a_plan_survives_its_folder(self, tmp_path):
        plan = plan_with_sets()
        assert plan.save_pretrained(tmp_path / "a") == tmp_path / "a"
        names = sorted(p.name for p in (tmp_path / "a").iterdir())
        assert names == ["README.md", "accel_plan.json", "accel_plan.safetensors"]
        assert Plan.from_pretrained(tmp_path / "a") == plan
        assert Plan.from_pretrained(str(tmp_path / "a")).digest == plan.digest

    def test_a_folder_without_a_plan(self, tmp_path):
        with pytest.raises(PlanError, match=r"has no accel_plan.json; Plan.save_pretrained"):
            Plan.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", ["nothing", "./a/b", "/a", "a/b/c", "a/"])
    def test_what_is_neither_a_folder_nor_a_repository(self, name):
        with pytest.raises(PlanError, match="is neither a folder nor a hub repository"):
            Plan.from_pretrained(name)


class TestHub:
    def test_a_repository_is_fetched_at_one_commit(self, tmp_path, monkeypatch):
        asked = {}

        def download(repo_id, **settings):
            asked.update(repo_id=repo_id, **settings)
            return str(plan_with_sets().save_pretrained(tmp_path))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        plan = Plan.from_pretrained("someone/plan", revision="v1", token="t", cache_dir=tmp_path)
        assert plan == plan_with_sets()
        assert asked == {
            "repo_id": "someone/plan",
            "revision": "v1",
            "token": "t",
            "cache_dir": tmp_path,
            "local_files_only": False,
            "allow_patterns": ["accel_plan.json", "accel_plan.safetensors"],
        }

    def test_a_repository_that_cannot_be_had(self):
        with pytest.raises(PlanError, match="there is no plan file 'nobody/no-such-plan' here"):
            Plan.from_pretrained("nobody/no-such-plan", local_files_only=True)

    def test_a_repository_without_a_plan(self, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(PlanError, match=r"'someone/plan' has no accel_plan.json"):
            Plan.from_pretrained("someone/plan")

    def test_a_plan_is_pushed_as_a_folder(self, monkeypatch):
        did = []

        class Api:
            def __init__(self, token=None):
                did.append(("token", token))

            def create_repo(self, repo_id, *, private, exist_ok):
                did.append(("create", repo_id, private, exist_ok))
                return SimpleNamespace(repo_id=f"me/{repo_id}")

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                files = {p.name: p.read_text(errors="replace") for p in Path(folder_path).iterdir()}
                did.append(("upload", repo_id, commit_message, files))
                return f"https://hub/{repo_id}/commit/1"

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        address = plan_with_sets().push_to_hub("plan", private=True, token="t")
        assert address == "https://hub/me/plan/commit/1"
        assert did[:2] == [("token", "t"), ("create", "plan", True, True)]
        _, repository, message, files = did[2]
        assert (repository, message) == ("me/plan", "Upload accel plan tiny")
        assert sorted(files) == ["README.md", "accel_plan.json", "accel_plan.safetensors"]
        assert json.loads(files["accel_plan.json"])["sets"]["file"] == "accel_plan.safetensors"
        assert 'accel.enable(pipe, "me/plan")' in files["README.md"]
        plan_with_sets().push_to_hub("plan", commit_message="better")
        assert did[-1][2] == "better"
        assert did[-2] == ("create", "plan", None, True)


class TestCard:
    def test_it_says_what_was_measured(self):
        text = card(measured())
        assert text.startswith("---\nlibrary_name: accel-suite\ntags:\n- accel\n")
        for line in (
            "# tiny",
            "| model class | WanTransformer3DModel |",
            "| sites made sparse | 2 of 2 |",
            "| grid (t, h, w) | 3 x 5 x 7 |",
            "| steps | 30 |",
            "| device | A processor, 2 threads |",
            "| speed-up over the host's dense attention, whole generation | 2.46x |",
            "| PSNR against the dense generation of the same seed | 31.2 dB |",
            "| dense generation | 36.1 s |",
            "| speed-up, whole generation | 2.40x |",
        ):
            assert line in text.splitlines()

    def test_it_invents_nothing(self):
        text = card(tiny_plan(DENSE))
        for word in ("Measured", "Predicted", "PSNR", "None", "steps", "device", "base_model"):
            assert word not in text
        odd = replace(measured(), expected={"measured_psnr": "best", "measured_speedup": 2.0})
        assert "best" not in card(odd)

    @pytest.mark.parametrize(
        ("provenance", "named"),
        [
            ({"model_path": "someone/model", "revision": "abc"}, True),
            ({"model_path": "someone/model", "revision": None}, False),
            ({"model_path": "samples/models/wan", "revision": "abc"}, False),
            ({"model_path": 3, "revision": "abc"}, False),
        ],
    )
    def test_the_base_model_is_one_of_the_hub(self, provenance, named):
        text = card(tiny_plan(DENSE, provenance=provenance))
        assert ('base_model: "someone/model"' in text.splitlines()) == named

    def test_text_of_a_plan_is_text(self):
        plan = tiny_plan(DENSE, name="a\n---\n# [b](c) | <d>", provenance={"device": "x | y\nz"})
        text = card(plan)
        assert "# a --- \\# \\[b\\](c) \\| \\<d\\>" in text.splitlines()
        assert "| device | x \\| y z |" in text.splitlines()
        assert text.count("\n---\n") == 1


class TestMadeAt:
    def test_what_a_plan_says(self):
        assert measured().made_at == MadeAt(GRID, 30, "float32", "cpu", "A processor, 2 threads")
        assert tiny_plan(DENSE).made_at == MadeAt()

    def test_steps_and_dtype_of_how_it_was_made(self):
        plan = tiny_plan(DENSE, provenance={**PROVENANCE, "dtype": "bfloat16"})
        assert plan.made_at == MadeAt(None, 30, "bfloat16", None, "A processor, 2 threads")

    def test_another_grid_does_not_change_where_it_was_made(self, tmp_path):
        plan = measured()
        other = plan.for_grid((5, 4, 6)).for_grid((7, 4, 6))
        assert (other.grid, other.made_at) == ((7, 4, 6), plan.made_at)
        assert Plan.load(other.save(tmp_path / "plan.json")).made_at == plan.made_at
        assert other.digest != plan.digest
        assert other.digest == replace(plan, grid=(7, 4, 6)).digest

    @pytest.mark.parametrize(
        "provenance",
        [
            {"call": 3, "device": 4, "dtype": []},
            {"call": {"num_inference_steps": "many"}},
            {"made_at": {"grid": [1, 2], "steps": True, "device": 3}},
            {"made_at": {"grid": "3x5x7"}},
        ],
    )
    def test_what_is_no_value_is_not_said(self, provenance):
        assert tiny_plan(DENSE, provenance=provenance).made_at == MadeAt()
