import torch

from accel import timing
from accel.timing import in_turns, quantile, warm_up

CPU = torch.device("cpu")


class TestInTurns:
    def test_every_round_visits_every_job_and_every_other_one_backwards(self):
        calls = []
        jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
        times = in_turns(jobs, CPU, rounds=3)
        assert {name: len(entries) for name, entries in times.items()} == {"a": 3, "b": 3, "c": 3}
        assert "".join(calls) == "abc" + "abc" + "cba" + "abc"

    def test_a_sample_is_the_mean_of_many_calls(self, monkeypatch):
        now = [0.0]

        def tick(seconds):
            now[0] += seconds

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
        jobs = {"short": lambda: tick(1 / 64), "long": lambda: tick(4.0)}
        repeats = {name: warm_up(j, CPU, seconds=1.0, sample_s=0.25) for name, j in jobs.items()}
        assert repeats == {"short": 16, "long": 1}
        times = in_turns(jobs, CPU, rounds=2, repeats=repeats)
        assert times == {"short": [1 / 64, 1 / 64], "long": [4.0, 4.0]}
        # 64 short calls and a long one to warm up; then 16 and 1 a round
        assert now[0] == (1.0 + 4.0) + 2 * (0.25 + 4.0)

    def test_no_round_begins_after_the_limit_once_there_are_three(self, monkeypatch):
        now = [0.0]

        def job():
            now[0] += 1.0

        monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
        assert len(in_turns({"job": job}, CPU, rounds=9, limit_s=1.5)["job"]) == 3
        assert len(in_turns({"job": job}, CPU, rounds=9, limit_s=4.5)["job"]) == 5
        assert len(in_turns({"job": job}, CPU, rounds=9)["job"]) == 9


def test_quantiles_are_linear_between_neighbours():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert abs(quantile([1.0, 2.0], 0.2) - 1.2) < 1e-12
