"""Tiles are tried out, and the fastest of those that compute the right thing stays."""

import pytest
import torch
from bench_cases import settings

from accel.errors import AccelError
from accel.kernels.reference import sparse_attention_reference
from accel.kernels.tiles import choose_tiles
from accel.pipelines import bench_tune
from accel.pipelines.bench_contest import Outcome
from accel.pipelines.bench_tune import fastest_tiles, key_of, tune

BLOCK = (64, 32)
SHAPES = {"s": {"heads": 2, "tokens": 70, "dim": 16, "dtypes": ["float32"]}}


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def asked():
    return settings("backends=[cpu]", shapes=SHAPES)


def key(precision="full"):
    case = settings(shapes=SHAPES).cases[0]
    return key_of(case, BLOCK, precision, 90)


class TestFastestTiles:
    def tuned(self, asked):
        return fastest_tiles(key(), asked.cases[0], BLOCK, "full", asked)

    def test_the_lowest_price_stays(self, asked, monkeypatch):
        prices = {}

        def contest(rivals, *_):
            tiles = choose_tiles(key())
            prices[tiles] = [0.9, None, 0.3][len(prices)] if len(prices) < 3 else 0.5
            return {"triton": Outcome(price=prices[tiles])}

        some = bench_tune.candidates(key())[:5]
        monkeypatch.setattr(bench_tune, "candidates", lambda _: some)
        monkeypatch.setattr(bench_tune, "contest", contest)
        best = self.tuned(asked)
        assert list(prices) == some
        assert prices[best] == 0.3
        assert choose_tiles(key()) == best

    def test_an_interruption_leaves_the_best_so_far(self, asked, monkeypatch):
        seen = []

        def contest(rivals, *_):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(choose_tiles(key()))
            return {"triton": Outcome(price=[0.4, 0.6][len(seen) - 1])}

        monkeypatch.setattr(bench_tune, "contest", contest)
        with pytest.raises(KeyboardInterrupt):
            self.tuned(asked)
        assert choose_tiles(key()) == seen[0]

    def test_a_winner_that_is_wrong_now_and_then_does_not_stay(self, asked, monkeypatch):
        some = bench_tune.candidates(key())[:3]
        prices = dict(zip(some, (0.6, 0.2, 0.4), strict=True))
        calls = []

        def attend(q, k, v, mask, *, precision, backend):
            calls.append(choose_tiles(key()))
            out = sparse_attention_reference(q, k, v, mask)
            return out * (1.5 if calls.count(some[1]) == 4 else 1.0)

        monkeypatch.setattr(bench_tune, "candidates", lambda _: some)
        monkeypatch.setattr(bench_tune, "sparse_attention", attend)
        monkeypatch.setattr(
            bench_tune, "contest", lambda *_: {"triton": Outcome(price=prices[choose_tiles(key())])}
        )
        assert self.tuned(asked) == choose_tiles(key()) == some[2]

    def test_where_none_is_right_the_rule_stays(self, asked, monkeypatch):
        rule = choose_tiles(key())
        monkeypatch.setattr(bench_tune, "contest", lambda *_: {"triton": Outcome(note="wrong")})
        assert self.tuned(asked) == choose_tiles(key()) == rule

    @pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted here")
    def test_candidates_run_with_their_tiles(self, asked, monkeypatch):
        from accel.kernels import attention_triton

        used = []

        def spy(asked_key, **options):
            used.append((asked_key, choose_tiles(asked_key, **options)))
            return used[-1][1]

        some = bench_tune.candidates(key())[:2]
        monkeypatch.setattr(bench_tune, "candidates", lambda _: some)
        monkeypatch.setattr(attention_triton, "choose_tiles", spy)
        assert self.tuned(asked) in some
        assert {found for found, _ in used} == {key()}
        assert list(dict.fromkeys(tiles for _, tiles in used)) == some


@pytest.mark.parametrize(
    ("precision", "bytes_", "arithmetic"),
    [("full", 4, "full"), ("half", 2, "full"), ("int8", 2, "int8"), ("fp8", 2, "fp8")],
)
def test_keys_are_those_of_the_calls(precision, bytes_, arithmetic):
    found = key(precision)
    assert (found.element_bytes, found.arithmetic) == (bytes_, arithmetic)
    assert (found.access, found.rest) == ("plain", "drop")


def test_a_processor_is_refused():
    with pytest.raises(AccelError, match="tune=true is for the Triton kernels of GPUs"):
        tune(settings(shapes=SHAPES))


@pytest.mark.gpu
def test_on_a_gpu():
    asked = settings("device=cuda", "backends=null", "blocks=[[128,64]]", shapes=SHAPES)
    (best,) = tune(asked).values()
    assert best in bench_tune.candidates(key_of(asked.cases[0], (128, 64), "full", 90))
