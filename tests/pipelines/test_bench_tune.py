"""Tiles are tried out, and the fastest of those that compute the right thing stays."""

from dataclasses import replace

import pytest
import torch
from bench_cases import settings

from accel.errors import AccelError
from accel.kernels.reference import sparse_attention_reference
from accel.kernels.tiles import _user_table, choose_tiles, save_tiles, user_table_path
from accel.pipelines.bench import tune as bench_tune
from accel.pipelines.bench.contest import Outcome
from accel.pipelines.bench.tune import fastest_tiles, key_of, tune

BLOCK = (64, 32)
SHAPES = {"s": {"heads": 2, "tokens": 70, "dim": 16, "dtypes": ["float32"]}}


@pytest.fixture(autouse=True)
def _own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def asked():
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "cpu")
    return settings(f"device={device}", f"backends=[{backend}]", shapes=SHAPES)


def key(precision="full", arch=90, block=BLOCK):
    return key_of(settings(shapes=SHAPES).cases[0], block, precision, arch)


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

    def test_nothing_is_kept_before_the_winner_is_known(self, asked, monkeypatch):
        """Neither an interruption nor a kill leaves a candidate that was only tried."""
        rule, seen = choose_tiles(key()), []

        def contest(rivals, *_):
            seen.append(choose_tiles(key()))
            assert not user_table_path().exists()
            if len(seen) == 3:
                raise KeyboardInterrupt
            return {"triton": Outcome(price=0.5)}

        monkeypatch.setattr(bench_tune, "contest", contest)
        with pytest.raises(KeyboardInterrupt):
            self.tuned(asked)
        assert len(set(seen)) == 3
        assert choose_tiles(key()) == rule
        assert not user_table_path().exists()

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


class TestAgain:
    @pytest.fixture
    def tunings(self, monkeypatch):
        """The keys that are tuned, on a card that is none."""
        found = []

        def fastest(key, *_):
            found.append(key)
            best = bench_tune.candidates(key)[1]
            save_tiles({key: best})
            return best

        monkeypatch.setattr(bench_tune, "fastest_tiles", fastest)
        monkeypatch.setattr(bench_tune, "device_name", lambda _: "a card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        return found

    @pytest.fixture
    def on_a_card(self, asked):
        return replace(asked, device=torch.device("cuda"))

    def test_what_is_tuned_stays(self, tunings, on_a_card):
        tune(on_a_card)
        table = user_table_path().read_bytes()
        assert tune(on_a_card) == {}
        assert tunings == [key()]
        assert user_table_path().read_bytes() == table

    @pytest.mark.parametrize("change", ["device", "versions", "code", "tiles", "notes"])
    def test_by_something_else_it_is_tuned_anew(self, change, tunings, on_a_card, monkeypatch):
        tune(on_a_card)
        if change == "tiles":
            user_table_path().unlink()
            _user_table.cache_clear()
        elif change == "notes":
            (user_table_path().parent / "tuned.json").write_text("[")
        else:
            names = {"device": "device_name", "versions": "versions", "code": "code_digest"}
            monkeypatch.setattr(bench_tune, names[change], lambda *_: "another")
        tune(on_a_card)
        assert tunings == [key()] * 2


def test_a_processor_is_refused():
    with pytest.raises(AccelError, match="tune=true is for the Triton kernels of GPUs"):
        tune(settings(shapes=SHAPES))


@pytest.mark.gpu
def test_on_a_gpu():
    asked = settings("device=cuda", "backends=null", "blocks=[[128,64]]", shapes=SHAPES)
    major, minor = torch.cuda.get_device_capability()
    ((found, best),) = tune(asked).items()
    assert found == key(arch=10 * major + minor, block=(128, 64))
    assert best in bench_tune.candidates(found)
    assert tune(asked) == {}
