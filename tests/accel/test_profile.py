"""Profiles: means, files, and what is refused of them."""

import json
from itertools import pairwise

import pytest
import torch

from accel.choice import Choice
from accel.errors import PlanError
from accel.estimators import BlockMassTopK
from accel.layout import Layout
from accel.pattern import Full, Share, Skip
from accel.profile import Profile

CANDIDATES = (Choice(Full()), Choice(BlockMassTopK(keep=0.4), order="hwt"), Choice(Share("branch")))
LAYOUT = Layout.of((3, 5, 7), text_before=4, padding=2)


def filled(seed: int = 0) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    profile = Profile(CANDIDATES, ("thw", "wht"), ("half",), LAYOUT)
    profile.provenance = {"calibration": ["a seven"], "rows": 16}
    profile.asked = {"block": [32, 16], "mass": None}
    for _ in range(2):
        for key, heads in ((("a", 0), 2), (("a", 1), 2), (("b", 0), 5)):
            tables = {
                name: torch.rand(rows, heads, generator=generator)
                for name, rows in (("errors", 3), ("keeps", 3), ("sparsities", 2), ("roundings", 1))
            }
            profile.add(key, **tables)
            profile.add_mass(key, torch.rand(heads, 4, 7, generator=generator))
    profile.mass_orders = {"a": ("thw", "wht"), "b": ("wht",) * 5}
    return profile


@pytest.mark.parametrize("values", [(1.0, 3.0), (2.0, 2.0, 5.0)])
def test_tables_are_means(values):
    profile = Profile(CANDIDATES)
    for value in values:
        profile.add(("a", 0), torch.full((3, 2), value), keeps=torch.full((3, 2), -value))
        profile.add_mass(("a", 0), torch.full((2, 4, 5), value))
    mean = sum(values) / len(values)
    torch.testing.assert_close(profile.errors["a", 0], torch.full((3, 2), mean))
    torch.testing.assert_close(profile.keeps["a", 0], torch.full((3, 2), -mean))
    torch.testing.assert_close(profile.masses["a", 0], torch.full((2, 4, 5), mean))
    assert profile.counts == profile.mass_counts == {("a", 0): len(values)}


def test_a_table_that_was_not_observed_every_time_has_no_mean():
    profile = Profile(CANDIDATES)
    profile.add(("a", 0), torch.rand(3, 2))
    with pytest.raises(ValueError, match="keeps of"):
        profile.add(("a", 0), torch.rand(3, 2), keeps=torch.rand(3, 2))


def test_profiles_survive_a_file_to_the_bit(tmp_path):
    profile = filled()
    back = Profile.load(profile.save(tmp_path / "profile.json"))
    for name in ("candidates", "orders", "precisions", "layout", "counts", "mass_counts"):
        assert getattr(back, name) == getattr(profile, name)
    assert (back.mass_orders, back.provenance) == (profile.mass_orders, profile.provenance)
    for name in ("errors", "keeps", "sparsities", "roundings", "masses"):
        ours, theirs = getattr(profile, name), getattr(back, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert back.bands("a") == [0, 1]
    assert back.incoherences == {}


def test_a_profile_goes_on_after_a_file_as_if_there_had_been_none(tmp_path):
    one = filled()
    other = Profile.load(one.save(tmp_path / "profile.json"))
    for profile in (one, other):
        profile.add_mass(("a", 1), torch.ones(2, 4, 7))
    assert torch.equal(one.masses["a", 1], other.masses["a", 1])


def test_saving_again_leaves_one_file_of_masses(tmp_path):
    for seed in range(2):
        filled(seed).save(tmp_path / "profile.json")
        assert len(list(tmp_path.iterdir())) == 2
    no_masses = filled()
    no_masses.masses.clear()
    no_masses.save(tmp_path / "profile.json")
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_a_crash_between_the_two_files_leaves_the_old_profile(tmp_path, monkeypatch):
    before = filled()
    path = before.save(tmp_path / "profile.json")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("accel.profile.json.dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        filled(1).save(path)
    back = Profile.load(path)
    assert torch.equal(back.masses["a", 0], before.masses["a", 0])


def changed(data, where, value):
    *path, last = where
    for step in path:
        data = data[step]
    data[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["schema"], 9, "schema 9"),
        (["seen", 0, "errors"], [[1.0, 2.0]], "3 rows"),
        (["seen", 0, "errors", 1, 0], "x", "finite"),
        (["seen", 0, "errors", 1], [1.0], "equal length"),
        (["seen", 0, "band"], 1.5, "band"),
        (["seen", 0, "erors"], [], "did you mean 'errors'"),
        (["candidates", 0, "select", "kind"], "ful", "did you mean 'full'"),
        (["layout", 0], ["text", 4], "no profile"),
        (["asked"], [], "asked must be of type dict"),
        (["masses", "digest"], "../../etc", "hexadecimal"),
        (["masses", "orders"], {}, "belongs nowhere"),
        (["masses", "orders", "a"], ["thw"], "shape"),
    ],
    ids=str,
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, where, value, message):
    path = filled().save(tmp_path / "profile.json")
    data = json.loads(path.read_text())
    changed(data, where, value)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Profile.load(path)


def test_half_a_file_is_refused(tmp_path):
    path = filled().save(tmp_path / "profile.json")
    path.write_text(path.read_text()[:200])
    with pytest.raises(PlanError, match="calibrate again"):
        Profile.load(path)
    with pytest.raises(PlanError, match="calibrate again"):
        Profile.load(tmp_path / "missing.json")


def test_bands_ascend():
    profile = Profile((Choice(Skip()),))
    for band in (2, 0, 1):
        profile.add(("a", band), torch.zeros(1, 2))
    assert all(a < b for a, b in pairwise(profile.bands("a")))
