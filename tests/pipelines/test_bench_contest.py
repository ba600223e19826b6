"""Who is timed, and what the others get in place of a time."""

import pytest
import torch
import torch.nn.functional as F
from bench_cases import qkv, settings

from accel.pipelines.bench import contest as bench_contest
from accel.pipelines.bench.contest import Rival, contest
from accel.pipelines.bench.gate import attention_gate

INPUTS = [qkv(), tuple(x.flip(2) for x in qkv())]


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def broken(q, k, v):
    raise RuntimeError("no kernel\nfor this card")


def refuse():
    raise ImportError("no module")


RIVALS = {
    "right": Rival(lambda: dense),
    "wrong": Rival(lambda: lambda q, k, v: 1.01 * dense(q, k, v)),
    "nan": Rival(lambda: lambda q, k, v: dense(q, k, v) * torch.nan),
    "broken": Rival(lambda: broken),
    "missing": Rival(refuse),
    "headless": Rival(lambda: lambda q, k, v: dense(q, k, v)[:, :2]),
    "allowed": Rival(lambda: lambda q, k, v: 1.01 * dense(q, k, v), "int8"),
}


@pytest.fixture
def outcomes(monkeypatch):
    """Outcomes by a clock on which the baseline takes 2 s, then 4 s."""

    def in_turns(jobs, device, **_):
        for job in jobs.values():
            job()
        times = {"right": [1.0, 4.0], "allowed": [4.0, 2.0], None: [2.0, 4.0]}
        return {name: times[name] for name in jobs}

    monkeypatch.setattr(bench_contest, "in_turns", in_turns)
    return contest(RIVALS, attention_gate(INPUTS[0], None, 16), INPUTS, settings(), dense)


def test_only_what_is_right_is_timed(outcomes):
    assert {name for name, outcome in outcomes.items() if outcome.seconds} == {"right", "allowed"}
    assert list(outcomes) == list(RIVALS)


def test_prices_are_medians_of_paired_ratios(outcomes):
    assert outcomes["right"].price == (0.5 + 1.0) / 2
    assert outcomes["allowed"].price == (2.0 + 0.5) / 2


def test_what_is_wrong_has_its_error(outcomes):
    wrong = outcomes["wrong"]
    assert wrong.error == pytest.approx(0.01, rel=1e-3)
    assert wrong.note.startswith("not timed: its error is 1.0e-02, the limit 1.")
    assert outcomes["nan"].error is None
    assert outcomes["nan"].note.startswith("not timed: its error is nan")
    assert outcomes["allowed"].limit == 0.05


def test_what_fails_has_its_reason(outcomes):
    assert outcomes["broken"].note == "RuntimeError: no kernel"
    assert outcomes["missing"].note == "ImportError: no module"
    assert outcomes["headless"].note.startswith("ValueError: the result is (2, 2, 16, 40), not")
    assert outcomes["broken"].error is outcomes["missing"].limit is None


def test_calls_take_the_inputs_in_turn():
    seen = []

    def spy(q, k, v):
        seen.append(q.data_ptr())
        return dense(q, k, v)

    gate = attention_gate(INPUTS[0], None, 16)
    found = contest({"spy": Rival(lambda: spy)}, gate, INPUTS, settings("rounds=3"), None)
    first, second = (some[0].data_ptr() for some in INPUTS)
    # the check looks at the first; then one call to warm up and three rounds
    assert seen == [first, second, first, second, first]
    assert len(found["spy"].seconds) == 3
    assert found["spy"].price is None


def test_a_rival_may_have_its_inputs_head_by_head():
    seen = []

    def spy(q, k, v):
        seen.extend((q, k, v))
        return dense(q, k, v)

    gate = attention_gate(INPUTS[0], None, 16)
    assert not INPUTS[0][0].is_contiguous()
    rivals = {"spy": Rival(lambda: spy, contiguous=True)}
    assert contest(rivals, gate, INPUTS, settings("rounds=1"), dense)["spy"].price
    assert all(x.is_contiguous() for x in seen)
    # converted once, and not in every call: the second call of each input finds the same memory
    assert len({x.data_ptr() for x in seen}) == 3 * len(INPUTS)


def test_the_time_of_compilation_stands_apart():
    assert bench_contest._compile_time(12.3, 0.01) == "first call 12.3 s"
    assert bench_contest._compile_time(0.9, 0.01) == ""
    assert bench_contest._compile_time(3.0, 2.0) == ""
