"""What a run reports: calls, kept blocks, recall, times, notices."""

import json
from dataclasses import replace

import pytest
import torch

from accel.choice import Choice
from accel.context import Where
from accel.estimators import BlockMassTopK
from accel.geometry import Geometry, Site
from accel.kernels.attention import resolve_backend
from accel.layout import Layout
from accel.masks import sampled_recall, site_mask
from accel.pattern import Share, Window
from accel.plan import Plan
from accel.records import Record, Stopwatch, phase_label
from accel.router import Session
from accel.run_summary import summarise
from accel.schedule import Schedule

LAYOUT = Layout.of((3, 4, 5))
GEOMETRY = Geometry("M", (Site("a", 2, 8), Site("b", 2, 8), Site("c", 2, 8)))
PRICED = {"tokens": LAYOUT.length, "device": "cpu", "dtype": "float32"}  # the calls of `run`
CHOICES = (Choice(Window(t=0)), Choice(BlockMassTopK(keep=0.5), order="hwt"))


def qkv(batch=2):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 2, LAYOUT.length, 8, generator=generator) for _ in range(3))


def session(sites=("a", "b"), expected=None, bands=()):
    schedule = Schedule(dense_start=0.25, bands=bands)
    return Session(
        Plan(
            name="tried",
            model="M",
            sites={s: (CHOICES,) * schedule.n_bands for s in sites},
            n_sites=3,
            head_dim=8,
            schedule=schedule,
            block=(16, 16),
            expected=expected or {},
        ),
        GEOMETRY,
    )


def run(one, total=4, branches=("",)):
    q, k, v = qkv()
    for step in range(total):
        for branch in branches:
            one.begin(LAYOUT, Where(step, total, branch))
            for site in GEOMETRY.sites:
                one.attend(site, q, k, v, lambda: q, None)
    return one


@pytest.fixture(scope="module")
def chosen():
    q, k, v = qkv()
    return site_mask(CHOICES, q, k, v, layout=LAYOUT, block=(16, 16), lse={})


def test_rows_are_in_the_order_of_the_model_dense_first():
    rows = summarise([run(session(sites=("b", "a")))]).rows
    assert [(r.site, r.phase, r.calls) for r in rows] == [
        (site, phase, calls) for site in "abc" for phase, calls in (("dense", 1), ("band 0", 3))
    ]


def test_bands_are_in_the_order_of_their_numbers():
    bands = tuple(i / 16 for i in range(4, 16))
    rows = summarise([run(session(sites=("a",), bands=bands), total=16)]).rows
    assert [r.phase for r in rows if r.site == "a"] == [
        "dense",
        *(f"band {i}" for i in range(1, 13)),
    ]


def test_keep_and_recall_are_those_of_the_mask(chosen):
    q, k, _ = qkv()
    row = next(r for r in summarise([run(session())]).rows if r.phase == "band 0")
    assert row.keep == pytest.approx(chosen.mask.to_dense().float().mean().item())
    recall = sampled_recall(q, k, chosen)
    assert row.recall == pytest.approx(recall.mean().item())
    assert row.worst_recall == pytest.approx(recall.min().item())
    assert row.kernels == (resolve_backend("auto", q.device),)


def test_recall_is_softmax_mass_inside_the_kept_blocks(chosen):
    """60 tokens are fewer than the rows that are sampled, so here every row counts."""
    q, k, _ = qkv()
    weights = (q.double() @ k.double().mT * 8**-0.5).softmax(-1)
    natural = chosen.mask.to_dense().repeat_interleave(16, 2).repeat_interleave(16, 3)
    inside = torch.stack(
        [
            (weights[:, h][:, o][:, :, o] * natural[:, h, :60, :60]).sum(-1).mean()
            for h, o in enumerate(chosen.order)
        ]
    )
    assert torch.allclose(sampled_recall(q, k, chosen).double(), inside, atol=1e-5)


def test_recall_is_looked_at_once_for_each_mask_and_branch():
    one = run(session(), branches=("cond", "uncond"))
    assert len(one.records["a", "band 0"].recall) == 2
    assert one.records["a", "band 0"].calls == 6


def test_sites_left_by_the_plan_are_dense_and_listed():
    summary = summarise([run(session())])
    assert summary.left == ("c",)
    assert {r.kernels for r in summary.rows if r.site == "c"} == {("dense",)}
    assert "left dense by the plan: c" in str(summary)


def test_predictions_are_ratios_of_this_runs_dense_calls():
    one = run(session(expected={"attention_ratio": {"a": [0.5]}, **PRICED}))
    one.records["a", "dense"].seconds[:] = [0.004]
    one.records["a", "band 0"].seconds[:] = [0.001, 0.003, 0.009]
    one.records["a", "band 0"].mask_seconds[:] = [0.003]
    one.records["a", "band 0"].recall_seconds.clear()
    summary = summarise([one])
    row = next(r for r in summary.rows if (r.site, r.phase) == ("a", "band 0"))
    assert row.predicted_ms == pytest.approx(2.0)
    assert row.call_ms == pytest.approx(3.0)
    assert row.mask_s == pytest.approx(0.003)
    assert row.mask_ms == pytest.approx(1.0)
    assert "3.0  4.0      2.0" in str(summary)
    assert row.total_s == pytest.approx(0.016)
    # three calls of 2 ms with masks, against three of 3 ms and 3 ms for masks
    assert summary.predicted_over_measured == pytest.approx(0.5)
    assert "predicted / measured time = 0.50" in str(summary)
    unpriced = [r.predicted_ms for r in summary.rows if (r.site, r.phase) != ("a", "band 0")]
    assert unpriced == [None] * 5


def test_predictions_for_another_grid_are_not_shown():
    one = run(session(expected={"attention_ratio": {"a": [0.5]}, **PRICED, "tokens": 4096}))
    summary = summarise([one])
    assert {r.predicted_ms for r in summary.rows} == {None}
    assert summary.predicted_over_measured is None


def test_masks_are_timed_apart_from_calls():
    one = run(session(), total=8, branches=("cond", "uncond"))
    record = one.records["a", "band 0"]
    assert (len(record.seconds), len(record.mask_seconds)) == (12, 2)
    dense = one.records["a", "dense"]
    assert (len(dense.seconds), dense.mask_seconds) == (4, [])
    assert (len(record.recall_seconds), dense.recall_seconds) == (2, [])


def test_without_a_prediction_there_is_no_ratio():
    summary = summarise([run(session())])
    assert summary.predicted_over_measured is None
    assert "predicted / measured" not in str(summary)


def test_notices_are_counted():
    one = session()
    q, k, v = qkv()
    for step in (1, 2):
        one.begin(LAYOUT, Where(step, 4))
        one.attend(GEOMETRY.sites[0], q, k, v, lambda: q, "the call has a mask")
    summary = summarise([one])
    assert summary.notices == {"the call has a mask": 2}
    assert "ran dense 2 times: the call has a mask" in str(summary)


def test_a_call_that_failed_is_no_row():
    one = session()
    one.begin(LAYOUT, Where(0, 4))
    with pytest.raises(MemoryError):
        one.attend(GEOMETRY.sites[0], *qkv(), lambda: (_ for _ in ()).throw(MemoryError), None)
    assert summarise([one]).rows == ()


def test_before_a_run_there_are_no_rows():
    assert summarise([session()]).rows == ()
    assert str(summarise([session()])).startswith("plan 'tried'\nsite")


def test_a_summary_is_a_value_that_json_takes():
    data = json.loads(json.dumps(summarise([run(session())]).to_dict()))
    assert data["plan"] == "tried"
    assert len(data["rows"]) == 6
    assert data["rows"][0]["site"] == "a"
    assert data["left"] == ["c"]


def test_the_table_has_a_line_for_each_row():
    text = str(summarise([run(session())])).splitlines()
    assert text[0] == "plan 'tried'"
    assert text[1].split() == [
        *("site", "phase", "calls", "keep", "recall", "worst", "kernel"),
        *("ms", "+", "masks", "predicted"),
    ]
    assert text[2].split()[:3] == ["a", "dense", "1"]
    assert len(text) == 2 + 6 + 1


def test_several_denoisers_are_told_apart():
    rows = summarise([run(session()), run(session())]).rows
    assert {r.site for r in rows} == {f"#{n}.{s}" for n in (1, 2) for s in "abc"}


@pytest.mark.parametrize("band", [None, 0, 11])
def test_labels(band):
    assert phase_label(band) == ("dense" if band is None else f"band {band}")


def test_looks_at_drift_and_recall_are_time_of_masks():
    one = run(session())
    record = one.records["a", "band 0"]
    record.seconds[:], record.mask_seconds[:] = [0.001] * 3, [0.002]
    record.check_seconds[:], record.recall_seconds[:] = [0.001] * 3, [0.004]
    row = next(r for r in summarise([one]).rows if (r.site, r.phase) == ("a", "band 0"))
    assert (row.mask_s, row.total_s) == pytest.approx((0.009, 0.012))


def test_heads_that_something_stands_in_for():
    shared = Choice(Share())
    one = session(sites=("a",))
    one.plan = replace(one.plan, sites={"a": ((shared, shared),)})
    rows = summarise([run(one)]).rows
    row = next(r for r in rows if (r.site, r.phase) == ("a", "band 0"))
    assert (row.keep, row.recall, row.worst_recall, row.kernels) == (0.0, None, None, ())
    line = next(x for x in str(summarise([one])).splitlines() if "band 0" in x)
    assert line.split()[4:8] == ["0.000", "-", "-", "-"]


def test_a_stopwatch_adds_one_entry():
    record = Record()
    Stopwatch(record, torch.device("cpu")).stop()
    Stopwatch(record, torch.device("cpu"), "mask_seconds").stop()
    record.settle()
    assert (len(record.seconds), len(record.mask_seconds)) == (1, 1)
    assert record.seconds[0] >= 0


@pytest.mark.gpu
def test_events_that_have_not_passed_are_not_waited_for():
    record, tensor = Record(), torch.randn(4096, 4096, device="cuda")
    watch = Stopwatch(record, tensor.device)
    for _ in range(50):
        tensor = tensor @ tensor
    watch.stop()
    record.settle(wait=False)
    assert record.seconds == []
    record.settle()
    record.settle()
    assert len(record.seconds) == 1


@pytest.mark.gpu
def test_events_are_settled_when_asked():
    record = Record()
    watch = Stopwatch(record, torch.device("cuda"))
    torch.ones(9, device="cuda").sum()
    watch.stop()
    assert record.seconds == []
    record.settle()
    assert len(record.seconds) == 1
