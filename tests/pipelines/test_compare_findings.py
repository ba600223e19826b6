"""What arms say together, from results made by hand."""

import pytest

from accel.pipelines.compare_findings import findings_of, lines_of, point_of, sentences_of
from accel.pipelines.compare_table import as_markdown, as_text, rows_of

HERE = {"grid": [17, 16, 12], "steps": 30}
THERE = {"grid": [9, 16, 12], "steps": 20}


def arm(kind, speedup=None, psnr=None, predicted=None, **changes):
    quality = None if psnr is None else {"mean": psnr, "worst": psnr - 1}
    return {
        "kind": kind,
        "front": None,
        "cache": None,
        "note": "",
        "precision": None,
        "notices": {},
        "speedup": speedup,
        "psnr": quality,
        "predicted_speedup": predicted,
        "predicted_from": predicted and "measured on CPU",
        "paired_in_one_sitting": True,
        "pairs": 2 if speedup else 0,
        "made_at": None,
        "call": None,
        **changes,
    }


@pytest.fixture
def results():
    return {
        "arms": {
            "dense": arm("dense", 0.8),
            "full": arm("dense", 1.0, 70.0, predicted=0.5),
            "ours": arm("plan", 2.0, 33.0, predicted=2.5, made_at=HERE, call=HERE),
            "far": arm("plan", 1.6, 32.0, predicted=1.6, made_at=THERE, call=HERE),
            "f-1": arm("front", 1.25, 40.0, predicted=1.25, front="f"),
            "f-2": arm("front", 2.5, 30.0, predicted=2.0, front="f"),
            "window": arm("recipe", 2.0, 25.0),
            "swift": arm("recipe", 4.0, 20.0),
            "slow": arm("recipe", 1.0, 36.0),
            "broken": arm("recipe", error="out of memory"),
            "pab": arm("cache", 1.25, 35.0, cache={"cache": "pab"}, note="half of it"),
            "ours+pab": arm("plan + cache", 2.5, 29.0, cache={"cache": "pab"}),
            "ours+fbcache": arm("plan + cache", 2.0, 28.0, cache={"cache": "fbcache"}),
        },
        "settings": {"model": "m", "dtype": "float32", "steps": 30, "prompts": ["a"], "rounds": 1},
        "dense_runs": {
            "dense": {
                "runs": 4,
                "seconds": {"least": 26.0, "median": 30.0, "most": 39.0},
                "most_over_least": 1.25,
            },
            "full": {
                "runs": 1,
                "seconds": {"least": 20.0, "median": 20.0, "most": 20.0},
                "most_over_least": None,
            },
        },
        "device": "CPU",
        "date": "now",
    }


@pytest.fixture
def found(results):
    return results | findings_of(results)


def test_a_point_is_a_fraction_of_the_fastest_dense(results):
    assert point_of(results["arms"]["ours"]) == (0.5, 33.0)
    assert point_of(results["arms"]["dense"]) is None
    assert point_of(results["arms"]["broken"]) is None


def test_the_front_is_held_against_every_other_arm_at_its_time(found):
    against = {n: a["against_front"] for n, a in found["arms"].items()}
    # times 0.8 with 40 dB and 0.4 with 30: 32.5 at 0.5
    assert against["window"]["f"] == pytest.approx({"psnr": 32.5, "above": 7.5})
    assert against["ours"]["f"]["above"] == pytest.approx(-0.5)
    assert against["slow"]["f"] == {"psnr": 40.0, "above": 4.0}
    assert against["pab"]["f"]["above"] == 5.0
    # before the fastest point there is nothing to compare
    assert against["swift"] == against["f-1"] == against["full"] == against["broken"] == {}


def test_fronts_are_lines_and_so_are_plans_with_caches_that_none_beats(results):
    assert lines_of(results["arms"]) == {"f": ["f-2", "f-1"], "plan + cache": ["ours+pab"]}
    results["arms"]["ours+fbcache"]["psnr"]["mean"] = 31.0
    assert lines_of(results["arms"])["plan + cache"] == ["ours+pab", "ours+fbcache"]


def test_hypervolumes_are_of_fronts_and_of_kinds(found):
    told = found["trade_off"]
    assert told["reference"] == {"time": 1.0, "psnr_floor": 15.0, "psnr_cap": 50.0}
    assert told["hypervolume"] == pytest.approx(
        {
            "f": 0.6 * 15 + 0.2 * 10,
            "recipes": 0.75 * 5 + 0.5 * 5,  # `slow` is as slow as dense
            "caches": 0.2 * 20,
            "plan + cache": 0.6 * 14,
        }
    )


def test_predictions_are_held_against_measured_times(found):
    """Of what leaves something out and was measured: 0.4 for 0.5, 0.5 for 0.4, two exact ones."""
    told = found["prediction"]
    assert told["arms"] == 4
    assert told["mape"] == pytest.approx((0.1 / 0.5 + 0.1 / 0.4) / 4)
    assert told["rank_correlation"] == pytest.approx(0.8)
    assert "off by 11.2% in the mean over 4 arms; rank correlation 0.80" in as_text(found)


def test_without_predictions_nothing_is_said_of_them(results):
    for one in results["arms"].values():
        one["predicted_speedup"] = None
    results |= findings_of(results)
    assert results["prediction"] is None
    assert not any("predicted" in line for line in sentences_of(results))


def test_a_plan_that_travelled_is_held_against_one_that_was_made_here(found):
    assert found["travelled"] == {
        "far": {
            "made_at": THERE,
            "ran_at": HERE,
            "against": "ours",
            "loss": 1.0,
            "time_ratio": pytest.approx(1.25),
        }
    }
    expected = (
        "found at 9x16x12 in 20 steps, 'far' loses 1.0 dB against 'ours', which was searched here"
        " (17x16x12 in 30 steps), at 1.25 times its time"
    )
    assert expected in sentences_of(found)


def test_a_plan_that_travelled_alone_says_from_where(results):
    results["arms"]["ours"]["made_at"] = None
    results |= findings_of(results)
    assert "'far' was found at 9x16x12 in 20 steps and ran at 17x16x12 in 30 steps" in sentences_of(
        results
    )


def test_the_precision_that_recipes_were_given_is_told(results):
    def told():
        return [line for line in sentences_of(results | findings_of(results)) if "comput" in line]

    assert told() == []
    for name in ("window", "slow"):
        results["arms"][name]["precision"] = "half"
    assert told() == [
        "recipes compute in precision 'half', like the dense arm of that name; one that chooses its"
        " precision keeps it"
    ]


def test_where_predictions_come_from_is_told(results):
    def told():
        lines = sentences_of(results | findings_of(results))
        return [line for line in lines if "kernel costs" in line]

    assert told() == ["predicted times rest on kernel costs: measured on CPU"]
    sheet = "uncalibrated: computed from the data sheet of h100-sxm"
    results["arms"]["far"]["predicted_from"] = sheet
    results["arms"]["f-2"]["predicted_from"] = ""
    assert told() == [
        "predicted times of ours, f-1 rest on kernel costs: measured on CPU",
        f"predicted times of far rest on kernel costs: {sheet}",
        "predicted times of f-2 rest on kernel costs: from where, the plan does not say",
    ]


def test_how_far_dense_runs_lie_apart_is_told(found):
    """A speed-up of a single pair is worth no more than that."""
    lines = as_text(found).splitlines()
    spread = "dense took 26.00 to 39.00 s in 4 runs, 30.00 in the median"
    assert f"{spread}; in one sitting up to 1.25 times apart" in lines
    assert not any(line.startswith("full took") for line in lines)
    pairs = "speed-ups are medians of at least 2 pairs with dense in the same turn"
    assert f"{pairs}, and may be off by as much as the dense runs lie apart" in lines
    for one in found["arms"].values():
        one["pairs"] *= 2
    assert pairs.replace("2", "4") in sentences_of(found)


def test_long_tables_are_grouped(found):
    rows = rows_of(found)
    alone = [row[0] for row in rows if len(row) == 1]
    assert alone == ["dense", "plans", "fronts", "recipes", "caches", "plan + cache"]
    lines = as_text(found).splitlines()
    assert len({len(line) for line in lines[: len(rows)]}) == 1
    markdown = as_markdown(found).splitlines()[: len(rows) + 1]
    assert len({line.count("|") for line in markdown}) == 1
    assert any(line.startswith("| **caches** |") for line in markdown)
    short = {**found, "arms": dict(list(found["arms"].items())[:5])}
    assert all(len(row) > 1 for row in rows_of(short))


def test_what_a_cache_lacks_and_what_failed_is_told(found):
    text = as_text(found)
    assert "pab: half of it" in text
    assert "broken failed: out of memory" in text
    assert "hypervolume (time below the fastest dense run times dB from 15 to 50): f 11.00" in text
    told = "at their times f is at least +4.0 dB above 2 of 3 recipes, nearest to slow"
    assert f"{told}; faster than all of it: swift" in text


def test_one_is_not_many(results):
    for name, one in results["arms"].items():
        if name != "ours":
            one["predicted_speedup"] = None
        if name in ("swift", "slow"):
            one["speedup"] = None
    told = sentences_of(results | findings_of(results))
    assert any(line.endswith("in the mean over 1 arm") for line in told)
    assert "at their times f is at least +7.5 dB above 1 of 1 recipe, nearest to window" in told
