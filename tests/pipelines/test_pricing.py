"""Baselines and tables of a tiny pipeline: what is measured, kept, refused and computed."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_wan import CALL, tiny_wan_config

from accel.choice import Choice
from accel.cost import KEEPS, CostTable, Price, keep_of, predict
from accel.errors import AccelError
from accel.estimators import Antidiagonal, BlockMassTopK, Pooled
from accel.hardware import CostSource, Hardware
from accel.kernels.arguments import RESTS
from accel.pipelines import pricing
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.cost_files import read_baseline
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.pricing import (
    calibrate,
    cost_tables,
    load_or_measure_baseline,
    load_or_measure_costs,
    measure_baseline,
    origin_of,
    priced,
    save_baseline,
    warm_up_steps,
)
from accel.plan import Plan
from accel.schedule import Schedule

PROMPT = "a one moving left"
BLOCK = (32, 16)
CHIP = Hardware(
    name="chip",
    sheet="its data sheet",
    tflops={"float32": 50.0, "bfloat16": 400.0},
    bandwidth_gb_s=2000.0,
)


@pytest.fixture(scope="module")
def host(tiny_wan_path):
    return Host(model_config(tiny_wan_config(tiny_wan_path)))


@pytest.fixture(scope="module")
def here(host):
    return origin_of(host.device)


@pytest.fixture(scope="module")
def baseline(host):
    return measure_baseline(host, PROMPT, 0)


@pytest.fixture
def measured(monkeypatch):
    """Notes what is measured, and gives prices that do not depend on how busy the machine is."""
    calls = []

    def measure(shape, *, estimators, known=None, origin=None, **_):
        calls.append((shape, tuple(e.work for e in estimators)))
        select = {e.work: Price.known(0.25) for e in estimators}
        if known is not None:
            return replace(known, select={**known.select, **select})
        row = [0.1 + 0.7 * keep for keep in KEEPS]
        rows = {f"{rest}/{order}": row for rest in RESTS for order in ("natural", "ordered")}
        table = CostTable.of(shape, 3.0, rows, {}, {"full": 0.9, "half": 0.85}, origin=origin)
        return replace(table, select=select)

    monkeypatch.setattr(pricing, "measure", measure)
    return calls


def some_plan(host, select=None, **settings):
    select = BlockMassTopK(keep=0.25) if select is None else select
    settings = {"block": BLOCK, "schedule": Schedule(dense_start=0.25), **settings}
    return Plan.uniform("some", geometry_of(host.pipe), Choice(select), **settings)


class TestBaseline:
    def test_what_a_dense_generation_tells(self, host, baseline):
        assert baseline.layout.grid == (5, 8, 12)
        assert (baseline.steps, baseline.branches, baseline.batch) == (4, 2, 1)
        assert set(baseline.share) == {site.name for site in geometry_of(host.pipe).sites}
        assert 0 < baseline.total_share < 1
        assert sum(baseline.attention.values()) * 4 < baseline.denoiser < baseline.seconds
        assert baseline.outside > 0
        assert baseline.rest > 0

    def test_it_leaves_no_hook_behind(self, host, baseline):
        model = denoisers_of(host.pipe)[0]
        assert not model._forward_hooks
        assert not model._forward_pre_hooks

    def test_it_is_kept(self, host, baseline, here, tmp_path, monkeypatch):
        path = tmp_path / "baseline.json"
        monkeypatch.setattr(pricing, "measure_baseline", lambda *_: baseline)
        made = load_or_measure_baseline(host, PROMPT, 0, path)
        monkeypatch.setattr(pricing, "measure_baseline", None)
        assert load_or_measure_baseline(host, PROMPT, 0, path) == made == baseline
        assert read_baseline(path) == (baseline, here)

    def test_one_of_elsewhere_is_measured_anew(self, host, baseline, here, tmp_path, monkeypatch):
        path = tmp_path / "baseline.json"
        save_baseline(
            replace(baseline, seconds=1e6, denoiser=None), path, replace(here, device="elsewhere")
        )
        monkeypatch.setattr(pricing, "measure_baseline", lambda *_: baseline)
        assert load_or_measure_baseline(host, PROMPT, 0, path) == baseline
        assert read_baseline(path) == (baseline, here)

    def test_a_line_is_kept_with_it(self, baseline, here, tmp_path):
        path = tmp_path / "baseline.json"
        save_baseline(baseline, path, here)
        made = calibrate([(1.0, 2.0), (2.0, 3.0)], [(3.0, 4.0)], path)
        assert (made.calibration.scale, made.calibration.offset) == pytest.approx((1.0, 1.0))
        assert made.calibration.mape == pytest.approx(0.0)
        assert read_baseline(path) == (made, here)

    def test_a_file_that_is_none(self, tmp_path):
        path = tmp_path / "baseline.json"
        path.write_text(json.dumps({"origin": {}}))
        with pytest.raises(AccelError, match="lacks the key 'baseline'"):
            read_baseline(path)


class TestTables:
    def table(self, host, baseline, path, *selects, **more):
        choices = [Choice(select) for select in selects]
        return load_or_measure_costs(host, baseline.layout, BLOCK, choices, path, 1, **more)

    def test_only_what_is_missing_is_measured(self, host, baseline, tmp_path, measured, here):
        path = tmp_path / "costs.json"
        self.table(host, baseline, path, Pooled(keep=0.5))
        first = self.table(host, baseline, path, Pooled(keep=0.2))
        assert [works for _, works in measured] == [("pooled",)]
        assert first.origin == here
        both = self.table(host, baseline, path, Pooled(keep=0.2), BlockMassTopK(keep=0.2))
        assert [works for _, works in measured] == [("pooled",), ("block_mass",)]
        assert CostTable.load(path, here) == both

    def test_the_shape_is_that_of_the_call(self, host, baseline, tmp_path, measured):
        made = self.table(host, baseline, tmp_path / "c.json", precision="half", batch=2)
        shape = made.shape
        assert (shape.tokens, shape.heads, shape.head_dim, shape.batch) == (480, 2, 24, 2)
        assert (shape.dtype, shape.device, shape.precision) == ("float32", "cpu", "half")

    def test_another_shape_or_origin_is_measured_anew(
        self, host, baseline, tmp_path, measured, here
    ):
        path = tmp_path / "costs.json"
        made = self.table(host, baseline, path)
        self.table(host, baseline, path, batch=2)
        replace(made, origin=replace(here, code="other")).save(path)
        assert self.table(host, baseline, path) == made
        assert len(measured) == 3

    def test_one_for_every_precision_of_a_plan(self, host, baseline, tmp_path, measured):
        plan = some_plan(host, precision={"blocks.0.attn1": "half"})
        tables = cost_tables(host, plan, baseline, tmp_path, 1)
        assert set(tables) == {"half", "full"}
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"costs-32x16-half.json", "costs-32x16-full.json"}

    def test_a_priced_plan(self, host, baseline, tmp_path, measured):
        plan = some_plan(host)
        made = priced(host, plan, baseline, tmp_path, 1)
        assert made.dense == "kernel"  # 0.8 of the host's
        tables = cost_tables(host, plan, baseline, tmp_path, 1)
        assert made.expected["seconds"] == predict(made, tables, baseline)
        keep = keep_of(plan.sites["blocks.0.attn1"][0][0], baseline.layout, BLOCK)
        expected = 0.1 + 0.7 * keep + 0.25 / 3
        assert made.ratio("blocks.0.attn1", 0, 480, "cpu", "float32") == pytest.approx(expected)

    def test_keeps_that_a_profile_has_seen(self, host, baseline, tmp_path, measured):
        plan = some_plan(host, Antidiagonal(tau=0.9, stride=8))
        assert "seconds" not in priced(host, plan, baseline, tmp_path, 1).expected
        keeps = {plan.sites["blocks.0.attn1"][0][0]: 0.25}
        assert priced(host, plan, baseline, tmp_path, 1, keeps=keeps).expected["seconds"] > 0


class TestElsewhere:
    @pytest.fixture
    def folder(self, host, baseline, here, tmp_path, measured):
        """What a run on a GPU has left."""
        there = replace(here, device="a large chip")
        save_baseline(baseline, tmp_path / "baseline-0123.json", there)
        cost_tables(host, some_plan(host), baseline, tmp_path, 1)
        (path,) = tmp_path.glob("costs*.json")
        table = CostTable.load(path)
        shape = replace(table.shape, device="cuda")
        replace(table, shape=shape, origin=there).save(path)
        measured.clear()
        return tmp_path

    def test_its_tables_are_taken_where_that_is_asked_for(self, host, baseline, folder, measured):
        source = CostSource(table=str(folder), foreign=True)
        found = load_or_measure_baseline(host, PROMPT, 0, folder / "new.json", source)
        assert found == baseline
        made = priced(host, some_plan(host), found, folder / "none", 1, hardware=source)
        assert made.expected["device"] == "cuda"
        assert made.expected["cost"] == "measured on a large chip"
        assert not measured
        assert not (folder / "new.json").exists()

    def test_and_refused_where_it_is_not(self, host, baseline, folder):
        source = CostSource(table=str(folder))
        with pytest.raises(AccelError, match=r"was measured on a large chip.*; this is"):
            load_or_measure_baseline(host, PROMPT, 0, folder / "new.json", source)
        with pytest.raises(AccelError, match=r"was measured on a large chip.*; this is"):
            priced(host, some_plan(host), baseline, folder, 1, hardware=source)

    def test_a_table_that_is_not_there(self, host, baseline, folder):
        source = CostSource(table=str(folder), foreign=True)
        with pytest.raises(AccelError, match=r"no table of Shape\(tokens=480.*it has Shape"):
            priced(host, some_plan(host, block=(64, 64)), baseline, folder, 1, hardware=source)
        with pytest.raises(AccelError, match="no price of the selections pooled"):
            priced(host, some_plan(host, Pooled(keep=0.2)), baseline, folder, 1, hardware=source)
        with pytest.raises(AccelError, match="neither a folder nor a file"):
            load_or_measure_baseline(
                host, PROMPT, 0, folder, replace(source, table=str(folder / "none"))
            )

    def test_a_baseline_of_another_model(self, host, baseline, here, tmp_path):
        save_baseline(replace(baseline, share={"x": 0.1}), tmp_path / "baseline.json", here)
        source = CostSource(table=str(tmp_path), foreign=True)
        with pytest.raises(AccelError, match=r"no baseline\*\.json of a model with these 2 sites"):
            load_or_measure_baseline(host, PROMPT, 0, tmp_path / "new.json", source)

    def test_one_table_alone(self, host, baseline, folder, monkeypatch):
        (path,) = folder.glob("costs*.json")
        source = CostSource(table=str(path), foreign=True)
        monkeypatch.setattr(pricing, "measure_baseline", lambda *_: baseline)
        found = load_or_measure_baseline(host, PROMPT, 0, folder / "new.json", source)
        made = priced(host, some_plan(host), found, folder / "none", 1, hardware=source)
        assert made.expected["seconds"] > 0

    def test_a_data_sheet(self, host, baseline, tmp_path, monkeypatch, measured):
        monkeypatch.setattr(pricing, "measure_baseline", lambda *_: baseline)
        source = CostSource(CHIP)
        found = load_or_measure_baseline(host, PROMPT, 0, tmp_path / "baseline.json", source)
        assert found.source == "roofline"
        assert (found.layout, found.steps, found.branches) == (baseline.layout, 4, 2)
        # what was measured here is kept as it was
        assert read_baseline(tmp_path / "baseline.json")[0] == baseline
        made = priced(host, some_plan(host), found, tmp_path, 1, hardware=source)
        assert made.expected["calibrated"] is False
        assert made.expected["device"] == "cuda"
        assert made.expected["cost"] == "uncalibrated: computed from the data sheet of chip"
        assert not measured


@pytest.mark.parametrize(
    ("start", "steps"), [(0.0, 2), (0.2, 2), (0.7, 2), (0.8, 3), (0.9, 6), (1.0, 2)]
)
def test_a_warm_up_has_a_sparse_step(start, steps):
    schedule = Schedule(dense_start=start)
    assert warm_up_steps(schedule, 10) == steps
    assert start == 1.0 or schedule.sparse_steps(steps)


@pytest.mark.parametrize(
    ("bands", "limit", "steps"),
    [((0.5,), 10, 2), ((0.5, 0.75), 10, 4), ((0.9,), 10, 10), ((0.9, 0.95), 10, 10)],
)
def test_a_warm_up_has_a_step_of_every_band_that_the_run_has(bands, limit, steps):
    """A band that was never warm would be met cold, and what it keeps would not be known."""
    assert warm_up_steps(Schedule(dense_start=0.0, bands=bands), limit) == steps


def test_the_tiny_pipeline_is_the_one_that_is_measured(host):
    assert host.steps == CALL["num_inference_steps"]
    assert next(denoisers_of(host.pipe)[0].parameters()).dtype == torch.float32
