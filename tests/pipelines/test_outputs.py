"""What holds of every kind of output, however it is judged."""

import json

import pytest

from accel.errors import AccelError
from accel.pipelines.compare_arms import DENSE, dense_arms, scaled_arms
from accel.pipelines.compare_book import code_of
from accel.pipelines.outputs import OUTPUTS, output_of
from accel.recipes import RECIPES

KINDS = pytest.mark.parametrize("kind", OUTPUTS.values(), ids=OUTPUTS)
RECORD = {"seconds": 0.5, "tokens": 4, "calls": 2, "images": 3, "summary": None}


@KINDS
def test_baselines_are_recipes_or_set_the_model_up(kind):
    assert kind.baselines[0] == DENSE.name
    assert DENSE.name in kind.names_of_dense
    for name in kind.baselines[1:]:
        setup = kind.setup(name, {"mode": "default"})
        assert setup is None or json.loads(json.dumps(setup)) == setup
        assert (setup is None) == (name in RECIPES)


@KINDS
def test_arms_of_baselines_are_told_apart(kind):
    arms = dense_arms(kind.baselines, kind, {})
    assert [arm.name for arm in arms] == list(kind.baselines)
    assert {arm.kind for arm in arms} == {"dense"}
    assert len({(arm.plan, arm.setup) for arm in arms}) == len(arms)
    (smaller,) = scaled_arms([0.5], {"fused": True})
    assert (smaller.name, smaller.kind, smaller.plan) == ("scaled-0.5", "scaled", None)
    assert json.loads(smaller.setup) == {"fused": True, "scale": 0.5}


@KINDS
def test_nothing_measured_is_nothing_told(kind):
    found = kind.results([None, None], [None, None], {0: [], 1: []})
    assert json.loads(json.dumps(found)) == found
    assert kind.quality.of(found) is None
    arm = {"kind": "dense", "against_front": {}, **found}
    for column in (*kind.columns_of_speed, *kind.columns_of_quality({"dense": arm})):
        assert column.text(arm) == "-"
        assert column.meaning
    assert kind.tiles(arm) == []
    for picture in kind.pictures:
        assert picture.speed.of(arm) is None
        assert picture.quality.of(arm) is None


@KINDS
def test_times_without_a_judgement_are_told(kind):
    found = kind.results([None], [None], {0: [RECORD]})
    assert json.loads(json.dumps(found)) == found


@KINDS
def test_what_computes_generations_is_known(kind):
    assert kind is output_of(kind.name)
    assert all(path.is_file() for path in code_of(kind))
    assert kind.callback(print) in ({"callback_on_step_end": print}, {})
    assert kind.repeats >= 1


def test_only_kinds_with_setups_are_set_up():
    for kind in OUTPUTS.values():
        if not kind.scales:
            with pytest.raises(NotImplementedError, match=f"models of {kind.name} are not"):
                kind.set_up(None, {})
    with pytest.raises(AccelError, match="did you mean 'vision'"):
        output_of("visoin")
