import json
import re
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_denoiser import tiny_plan

from accel.choice import DENSE
from accel.decoding import CONFIDENCES, MAX_TOKENS, RULES, SPEAKS_OF, Decoding
from accel.errors import PlanError
from accel.plan import Plan

PLAN = tiny_plan(DENSE)


@st.composite
def decodings(draw):
    rule = draw(st.sampled_from(tuple(RULES)))
    limits = RULES[rule]
    bound = None if limits is None else draw(st.floats(limits[0], min(limits[1], 1e6)))
    return Decoding(
        block_length=draw(st.none() | st.integers(1, MAX_TOKENS)),
        tokens_per_step=draw(st.integers(1, MAX_TOKENS)),
        confidence=draw(st.sampled_from(SPEAKS_OF.get(rule, CONFIDENCES))),
        rule=rule,
        bound=bound,
        stop_at_eos=draw(st.booleans()),
    )


@given(decodings())
def test_a_decoding_survives_its_dictionary(decoding):
    data = json.loads(json.dumps(decoding.to_dict()))
    assert Decoding.from_dict(data) == decoding


@given(decodings())
def test_a_plan_with_a_decoding_survives_its_file(tmp_path_factory, decoding):
    plan = replace(PLAN, decoding=decoding)
    loaded = Plan.load(plan.save(tmp_path_factory.mktemp("plans") / "plan.json"))
    assert loaded == plan
    assert loaded.decoding == decoding
    assert loaded.digest == plan.digest != PLAN.digest


def test_a_plan_without_one_says_nothing_of_it():
    assert "decoding" not in PLAN.to_dict()
    assert Plan.from_dict({**PLAN.to_dict(), "decoding": None}).digest == PLAN.digest
    digests = {replace(PLAN, decoding=Decoding(block_length=n)).digest for n in (None, 8, 16)}
    assert len(digests) == 3


@pytest.mark.usefixtures("unchecked")
def test_what_is_left_out_has_its_default():
    assert Decoding.from_dict({}) == Decoding()
    assert Decoding.from_dict({"rule": "threshold", "bound": 1}) == Decoding(
        rule="threshold", bound=1.0
    )


WHOLE = f"is a number of tokens from 1 to {MAX_TOKENS}"
BAD = {
    "block of none": ({"block_length": 0}, f"decoding.block_length {WHOLE}, got 0"),
    "block too long": ({"block_length": MAX_TOKENS + 1}, f"decoding.block_length {WHOLE}"),
    "block half": ({"block_length": 8.0}, f"decoding.block_length {WHOLE}, got 8.0"),
    "block a switch": ({"block_length": True}, f"decoding.block_length {WHOLE}, got True"),
    "quota of none": ({"tokens_per_step": 0}, f"decoding.tokens_per_step {WHOLE}, got 0"),
    "quota null": ({"tokens_per_step": None}, f"decoding.tokens_per_step {WHOLE}, got None"),
    "confidence": (
        {"confidence": "margins"},
        "decoding.confidence 'margins' is unknown; did you mean 'margin'?",
    ),
    "confidence a list": ({"confidence": []}, "decoding.confidence [] is unknown"),
    "rule": ({"rule": "treshold"}, "decoding.rule 'treshold' is unknown; did you mean 'threshold'"),
    "rule null": ({"rule": None}, "decoding.rule None is unknown"),
    "stop": ({"stop_at_eos": 1}, "decoding.stop_at_eos is true or false, got 1"),
    "quota with a bound": ({"bound": 0.9}, "decoding.rule 'quota' has no bound, got 0.9"),
    "no bound": ({"rule": "threshold"}, "decoding.bound is a number from 0 to 1 for rule"),
    "above one": ({"rule": "threshold", "bound": 1.1}, "from 0 to 1 for rule 'threshold', got 1.1"),
    "below zero": (
        {"rule": "threshold_or_quota", "bound": -0.1},
        "decoding.bound is a number from 0 to 1",
    ),
    "nan": ({"rule": "factor", "bound": nan}, "decoding.bound is a number of at least 0 for rule"),
    "infinite": ({"rule": "factor", "bound": inf}, "of at least 0 for rule 'factor', got inf"),
    "a word": ({"rule": "factor", "bound": "1"}, "decoding.bound is a number of at least 0"),
    "a switch": ({"rule": "threshold", "bound": True}, "decoding.bound is a number from 0 to 1"),
    "threshold of entropy": (
        {"rule": "threshold", "bound": 0.5, "confidence": "entropy"},
        "decoding.rule 'threshold' needs confidence probability or margin, got 'entropy'",
    ),
    "factor of margin": (
        {"rule": "factor", "bound": 1.0, "confidence": "margin"},
        "decoding.rule 'factor' needs confidence probability, got 'margin'",
    ),
    "bound of entropies": (
        {"rule": "entropy_bound", "bound": 0.5},
        "decoding.rule 'entropy_bound' needs confidence entropy, got 'probability'",
    ),
    "unknown key": (
        {"block_lenght": 8},
        "decoding has no key 'block_lenght'; did you mean 'block_length'?",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_refused(data, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        Decoding.from_dict(data)
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_dict({**PLAN.to_dict(), "decoding": data})


@pytest.mark.parametrize("data", [[], "quota", 3])
def test_a_decoding_is_a_table(data):
    with pytest.raises(PlanError, match="decoding must be a table"):
        Plan.from_dict({**PLAN.to_dict(), "decoding": data})
