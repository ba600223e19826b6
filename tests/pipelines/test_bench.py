"""`accel-bench` from settings to files: what is measured, kept, taken over, and shown."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from bench_cases import CASE, config, row, settings

from accel.errors import AccelError
from accel.kernels import native
from accel.pipelines.bench import bench, run
from accel.pipelines.bench import kernels as bench_kernels
from accel.pipelines.bench import results as bench_results
from accel.pipelines.bench.case import Part
from accel.pipelines.bench.contest import Outcome
from accel.pipelines.bench.kernels import KERNELS, Bench, fastest
from accel.pipelines.bench.page import page
from accel.pipelines.bench.plot import time_against_keep, write_plots
from accel.pipelines.bench.results import Results, measured
from accel.pipelines.bench.settings import bench_settings
from accel.pipelines.bench.table import as_text

CPU = torch.device("cpu")
DENSE = row(kernel="dense", backend="sdpa", keep=1.0, kept=1.0, block=None)


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """A whole run of every kernel: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "page").mkdir()
    values = config("kernel=all", f"out={folder}", f"page={folder}/page/cpu.md")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words: said.append(" ".join(map(str, words))))
        bench(values, "accel-bench kernel=all")
    return folder, "\n".join(said)


class TestRun:
    def test_every_kernel_and_mask_has_its_rows(self, measured_once):
        rows = json.loads((measured_once[0] / "bench.json").read_text())["rows"]
        count = {kernel: sum(r["kernel"] == kernel for r in rows) for kernel in
                 ("dense", "attention", "block_mass", "antidiagonal")}  # fmt: skip
        # keep 1 with even rows, 0.25 with both kinds, by two backends
        assert count == {"dense": 1, "attention": 6, "block_mass": 2, "antidiagonal": 1}
        assert {(r["keep"], r["rows"]) for r in rows if r["kernel"] == "attention"} == {
            (1.0, "uniform"), (0.25, "uniform"), (0.25, "uneven"),
        }  # fmt: skip

    def test_what_was_timed_was_checked(self, measured_once):
        for found in json.loads((measured_once[0] / "bench.json").read_text())["rows"]:
            if found["ms"] is None:
                assert (found["backend"], native.available()) == ("native", False)
                continue
            assert found["error"] <= found["limit"] < 1e-4
            assert found["ms"]["p20"] <= found["ms"]["median"] <= found["ms"]["p80"]
            assert found["baseline"] == "sdpa"
            assert found["tflops"] > 0 < found["price"]

    def test_a_file_says_what_it_was_measured_on(self, measured_once):
        found = json.loads((measured_once[0] / "bench.json").read_text())
        assert found["versions"]["torch"] == torch.__version__.split("+")[0]
        assert "threads" in found["device"]
        assert found["settings"]["keeps"] == [1.0, 0.25]
        assert all(len(r["date"]) == 10 for r in found["rows"])
        assert all(r["rounds"] == 2 for r in found["rows"] if r["ms"])

    def test_terminal_page_and_plot(self, measured_once):
        folder, said = measured_once
        assert "mine: 2 x 3 x 301 x 40, float32" in said
        assert "efficiency" in said
        assert b"<svg" in (folder / "mine-float32.svg").read_bytes()
        beside = sorted(p.name for p in (folder / "page").iterdir())
        assert beside == ["cpu-mine-float32.svg", "cpu.json", "cpu.md"]
        text = (folder / "page" / "cpu.md").read_text()
        assert "[cpu.json](cpu.json)" in text
        assert "![time against keep](cpu-mine-float32.svg)" in text
        assert "`accel-bench kernel=all`" in text
        assert "| cpu | full | 64 x 32 | uneven | - |" in text

    def test_what_is_there_is_not_measured_again(self, measured_once, monkeypatch):
        folder, _ = measured_once
        before = (folder / "bench.json").read_bytes()

        def fail(*_):
            raise AssertionError("measured again")

        monkeypatch.setattr("accel.pipelines.bench.Bench", fail)
        bench(config("kernel=all", f"out={folder}"), "")
        bench(config("kernel=[antidiagonal,attention]", f"out={folder}"), "")
        assert (folder / "bench.json").read_bytes() == before

    def test_a_run_that_was_killed_keeps_what_it_has(self, tmp_path, monkeypatch):
        asked = settings("kernel=[block_mass,antidiagonal]")

        def killed(bench, part):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            kernel = replace(KERNELS["antidiagonal"], setup=killed)
            patch.setitem(KERNELS, "antidiagonal", kernel)
            with pytest.raises(KeyboardInterrupt):
                run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        again = Results(tmp_path / "b.json", CPU, asked.conditions)
        assert {r.kernel for r in again.rows} == {"dense", "block_mass"}
        before = list(again.rows)
        rows = run(asked, again)
        assert [r.kernel for r in rows] == ["dense"] + ["block_mass"] * 2 + ["antidiagonal"]
        assert rows[:3] == before

    def test_every_mask_is_kept_as_soon_as_it_is_measured(self, tmp_path, monkeypatch):
        asked = settings("backends=[cpu]", "keeps=[1.0,0.5,0.25]")
        setup = KERNELS["attention"].setup

        def killed(bench, part):
            if part.keep == 0.25:
                raise KeyboardInterrupt
            return setup(bench, part)

        with monkeypatch.context() as patch:
            patch.setitem(KERNELS, "attention", replace(KERNELS["attention"], setup=killed))
            with pytest.raises(KeyboardInterrupt):
                run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        again = Results(tmp_path / "b.json", CPU, asked.conditions)
        parts = [(r.keep, r.rows) for r in again.rows if r.kernel == "attention"]
        assert parts == [(1.0, "uniform"), (0.5, "uniform"), (0.5, "uneven")]
        before = list(again.rows)
        rows = run(asked, again)
        assert rows[: len(before)] == before
        # the dense mode of the first sitting counts in the second
        assert all(r.own_efficiency for r in rows if r.kernel == "attention")

    def test_what_failed_is_tried_again_and_nothing_else(self, tmp_path, monkeypatch):
        asked = settings("backends=[native,cpu]", "keeps=[0.5]", "rows=[uniform]")

        def refused():
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr("accel.pipelines.bench.rivals._own", lambda backend, *_: refused())
            rows = run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        assert [r.note for r in rows[1:]] == ["RuntimeError: out of memory"] * 2
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            first = run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        assert [bool(r.ms) for r in first] == [True, False, True]
        rows = run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        assert (rows[0], rows[2]) == (first[0], first[2])
        assert len(rows) == 3
        assert bool(rows[1].ms) == native.available()

    def test_an_order_and_a_rest_are_measured_and_named(self, tmp_path):
        asked = settings("order=per_head", "rest=mean", "keeps=[0.25]", "backends=[cpu,flex]")
        results = Results(tmp_path / "b.json", CPU, asked.conditions)
        dense, *rows = run(asked, results)
        assert dense.backend == "sdpa"
        assert {r.backend for r in rows} == {"cpu per_head mean", "flex per_head mean"}
        for found in rows:
            if found.backend.startswith("cpu"):
                assert found.ms
                assert found.error <= found.limit
                continue
            assert found.note == "NotImplementedError: it has no order=per_head and no rest=mean"
            assert not found.failed

    def test_without_a_baseline_nothing_else_is_measured(self, tmp_path, monkeypatch):
        def refused(q, k, v):
            raise RuntimeError("not for this card")

        monkeypatch.setattr(bench_kernels, "dense_attentions", lambda *_: {"sdpa": refused})
        with pytest.raises(AccelError, match="nothing could be timed; the reasons stand in"):
            bench(config(f"out={tmp_path}"), "")
        (only,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
        assert only["note"] == "RuntimeError: not for this card"

    def test_a_case_without_memory_harms_no_other(self, tmp_path, monkeypatch, capsys):
        small = {"heads": 1, "tokens": 70, "dim": 16, "dtypes": ["float32"]}
        asked = settings("kernel=block_mass", shapes={"large": {**small, "heads": 2}, "s": small})
        inputs_of = bench_kernels.inputs_of

        def limited(case, device):
            if case.shape == "large":
                raise torch.OutOfMemoryError("tried to allocate 9 GiB")
            return inputs_of(case, device)

        monkeypatch.setattr(bench_kernels, "inputs_of", limited)
        rows = run(asked, Results(tmp_path / "b.json", CPU, asked.conditions))
        assert {r.shape for r in rows} == {"s"}
        assert "large float32 is left out: tried to allocate 9 GiB" in capsys.readouterr().out

    @pytest.mark.gpu
    def test_on_a_gpu(self, tmp_path):
        shapes = {"g": {"heads": 3, "tokens": 1003, "dim": 128, "dtypes": ["bfloat16"]}}
        values = config("device=cuda", "kernel=all", "backends=null", f"out={tmp_path}",
                        "precisions=[full,int8,fp8]", shapes=shapes)  # fmt: skip
        bench(values, "")
        rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
        timed = {(r["kernel"], r["backend"], r["mode"]) for r in rows if r["ms"]}
        assert {("attention", "triton", mode) for mode in ("full", "int8", "fp8")} <= timed
        assert any(kernel == "dense" for kernel, _, _ in timed)
        assert {"block_mass", "antidiagonal"} <= {kernel for kernel, _, _ in timed}


class TestRows:
    def test_fields_of_an_outcome(self):
        fields = measured(Outcome(seconds=(0.004, 0.001, 0.002)), flops=4e9)
        assert fields["ms"] == pytest.approx({"median": 2.0, "p20": 1.4, "p80": 3.2})
        assert fields["tflops"] == pytest.approx(2.0)

    def test_without_a_time_there_is_no_speed(self):
        fields = measured(Outcome(error=1.0, limit=0.1, note="not timed"), flops=4e9)
        assert fields["ms"] is fields["tflops"] is None
        assert fields["note"] == "not timed"

    def test_efficiencies(self, monkeypatch):
        """Dense takes 1 and accel with every block 0.8: then 0.5 at a quarter is half as good as
        the one and 0.4 of the other.
        """
        prices = iter([0.8, 0.5, 0.2])

        def contest(rivals, *_):
            return {name: Outcome(seconds=(1.0,), price=next(prices)) for name in rivals}

        monkeypatch.setattr(bench_kernels, "contest", contest)
        # blocks that fit, so that a quarter of the blocks is a quarter of the pairs
        shapes = {"mine": {"heads": 1, "tokens": 256, "dim": 16, "dtypes": ["float32"]}}
        asked = settings("backends=[cpu]", shapes=shapes)
        bench, rows = Bench(asked.cases[0], asked), [replace(DENSE, **asdict(asked.cases[0]))]
        for part in KERNELS["attention"].parts(asked):
            rows += bench.rows("attention", part, rows)
        full, even, uneven = rows[1:]
        assert (full.efficiency, full.own_efficiency) == pytest.approx((1.25, 1.0))
        assert (even.efficiency, even.own_efficiency) == pytest.approx((0.5, 0.4))
        assert even.tflops == pytest.approx(4 * 256 * 256 * 16 / 4 / 1e12)
        assert uneven.kept != even.kept
        assert uneven.own_efficiency == pytest.approx(0.8 * uneven.efficiency)

    def test_the_fastest_of_those_that_were_timed(self):
        times = {"a": {"median": 3.0}, "b": None, "c": {"median": 2.0}}
        rows = [replace(DENSE, backend=name, ms=ms) for name, ms in times.items()]
        assert fastest(rows) == "c"
        assert fastest(rows[1:2]) is None


class TestResults:
    def test_rows_survive_their_file(self, tmp_path):
        Results(tmp_path / "b.json", CPU, {"rounds": 1}).add([row(), DENSE])
        assert Results(tmp_path / "b.json", CPU, {"rounds": 1}).rows == [row(), DENSE]

    @pytest.mark.parametrize("change", ["settings", "code", "versions", "device"])
    def test_rows_of_something_else_are_not_taken_over(self, change, tmp_path, monkeypatch):
        Results(tmp_path / "b.json", CPU, {"rounds": 1}).add([row()])
        rounds = 2 if change == "settings" else 1
        if change == "code":
            monkeypatch.setattr(bench_results, "_code", lambda: "0")
        if change == "versions":
            monkeypatch.setattr(bench_results, "_versions", lambda _: {})
        if change == "device":
            monkeypatch.setattr(bench_results, "device_name", lambda _: "another")
        assert Results(tmp_path / "b.json", CPU, {"rounds": rounds}).rows == []

    def test_rows_belong_to_a_kernel_and_a_case(self, tmp_path):
        results = Results(tmp_path / "b.json", CPU, {})
        rows = [row(batch=2), row(batch=2, kernel="dense"), row(batch=2, dtype="bfloat16")]
        results.add(rows)
        assert results.of(replace(CASE, dim=40)) == rows[:2]
        part = Part((64, 32), 0.25, "uniform")
        assert [r for r in rows if r.of("attention", CASE, part)] == rows[:1]
        assert not rows[0].of("attention", CASE, part._replace(rows="uneven"))

    def test_a_row_takes_the_place_of_the_same_rival(self, tmp_path):
        results = Results(tmp_path / "b.json", CPU, {})
        results.add([row(ms=None), row(backend="cpu")])
        results.add([row()])
        assert results.rows == [row(), row(backend="cpu")]

    def test_other_settings_lose_nothing(self, tmp_path, capsys):
        path = tmp_path / "bench.json"
        Results(path, CPU, {"rounds": 1}).add([row()])
        Results(path, CPU, {"rounds": 2}).add([row(keep=0.5), row(keep=0.1)])
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1
        assert said[0].startswith("results of other settings, code or device are kept: ")
        assert Path(said[0].rsplit(" ", 1)[1]).is_file()
        assert Results(path, CPU, {"rounds": 1}).rows == [row()]
        assert len(Results(path, CPU, {"rounds": 2}).rows) == 2
        assert len(list(tmp_path.iterdir())) == 2

    def test_the_code_of_every_part_of_the_measurement_is_known(self):
        folder = Path(bench_results.__file__).parent
        parts = {p.stem for p in folder.glob("[!_]*.py")}
        assert set(bench_results.CODE) == parts - {"page", "plot", "settings", "table", "tune"}


ABOUT = {"device": "AMD EPYC, 2 threads", "versions": {"torch": "2.15"}}


class TestPictures:
    def test_columns_without_content_are_left_out(self):
        text = as_text([row(), row(backend="cpu", price=None, efficiency=None)])
        head = text.splitlines()[1]
        assert "efficiency" in head
        assert "note" not in head
        assert "in attention" not in head
        assert "2.5 [2, 3]" in text

    def test_cases_stand_apart(self):
        text = as_text([row(), row(dtype="bfloat16"), row(keep=0.5)])
        assert text.count("float32") == 1
        assert text.index("0.50 uniform") < text.index("bfloat16")

    def test_a_plot_needs_dense_and_sparse(self, tmp_path):
        assert time_against_keep([row()]) is None
        assert time_against_keep([DENSE]) is None
        assert write_plots([row(ms=None), DENSE], tmp_path) == []
        picture = time_against_keep([DENSE, row(), row(rows="uneven", kept=0.2)])
        assert picture.count(b"<!-- native full, 64 x 32 -->") == 1
        assert b"<!-- ideal -->" in picture

    def test_a_page_says_when_its_rows_were_measured(self):
        rows = [DENSE, row(date="2026-02-03"), row(keep=0.5, ms=None, date="2027-01-01")]
        assert "AMD EPYC, 2 threads; 2026-01-02 to 2026-02-03; torch 2.15." in page(
            ABOUT, rows, "accel-bench", "cpu"
        )
        assert "threads; 2026-01-02; torch" in page(ABOUT, [DENSE], "accel-bench", "cpu")

    def test_the_page_of_a_step(self):
        step = {"kernel": "wan_step", "block": None, "efficiency": None}
        rows = [row(**step, backend="sdpa", keep=1.0, price=1.0, share=0.8, error=None),
                row(**step, backend="accel", share=0.5)]  # fmt: skip
        text = page(ABOUT, rows, "accel-bench kernel=wan_step", "wan-step")
        assert "| accel | 0.25 uniform | 2.5 [2, 3] | 0.500 | 50% | 1.0e-07 |" in text
        assert "| sdpa | 1.00 uniform | 2.5 [2, 3] | 1.000 | 80% | - |" in text
        assert "Each cell" not in text
        assert ".svg" not in text

    def test_a_page_has_a_line_for_every_backend(self):
        rows = [DENSE, row(), row(keep=1.0, efficiency=1.25), row(rows="uneven", ms=None)]
        rows.append(row(kernel="block_mass", mode="known lse"))
        text = page(ABOUT, rows, "accel-bench", "cpu")
        assert "| backend | precision | block | rows | keep 1 | keep 0.25 |" in text
        assert "| native | full | 64 x 32 | uniform | 2.5 (1.25) | 2.5 (0.52) |" in text
        assert "| native | full | 64 x 32 | uneven | - | - |" in text
        assert "block_mass, known lse, blocks of 64 x 32: 2.5 ms, 0.50 of a dense call." in text
        assert "![time against keep](cpu-mine-float32.svg)" in text


class TestSettings:
    def test_defaults_of_a_processor(self):
        values = config("blocks=null", "backends=null", "keeps=[0.1,1.0,0.5]")
        asked = bench_settings(values)
        assert asked.blocks == ((64, 64),)
        assert asked.backends == ("native", "cpu", "flex")
        assert asked.keeps == (1.0, 0.5, 0.1)
        assert asked.masks == [
            (1.0, "uniform"), (0.5, "uniform"), (0.5, "uneven"), (0.1, "uniform"), (0.1, "uneven"),
        ]  # fmt: skip

    def test_shapes_keep_their_dtypes_unless_others_are_asked_for(self):
        shapes = {"a": {"heads": 1, "tokens": 9, "dim": 16, "dtypes": ["float32", "float16"]},
                  "b": {"heads": 1, "tokens": 9, "dim": 16}}  # fmt: skip
        own = [(case.shape, case.dtype) for case in settings(shapes=shapes).cases]
        assert own == [("a", "float32"), ("a", "float16"), ("b", "bfloat16")]
        asked = settings("dtype=float32", shapes=shapes).cases
        assert [(case.shape, case.dtype) for case in asked] == [("a", "float32"), ("b", "float32")]

    def test_automatic_shapes_are_those_of_the_device(self):
        from hydra import compose, initialize_config_module
        from omegaconf import OmegaConf

        with initialize_config_module("accel.configs", version_base="1.3"):
            shapes = OmegaConf.to_container(compose("bench").shapes)
        assert {case.shape for case in settings(shapes=shapes).cases} == set(shapes["cpu"])
        assert {"wan-14b-720p", "hunyuan-720p", "flux-2048", "llada-8b-64k"} < set(shapes["cuda"])

    @pytest.mark.parametrize("option", ["order=per_head", "rest=mean"])
    def test_what_only_attention_reads_is_for_attention(self, option):
        assert settings(option, "kernel=all").kernels
        with pytest.raises(AccelError, match="which only kernel=attention reads"):
            settings(option, "kernel=[block_mass,antidiagonal]")

    def test_a_stride_divides_the_blocks(self):
        assert settings("stride=24").stride == 24
        with pytest.raises(AccelError, match="stride is 24; it must divide the sizes of"):
            settings("stride=24", "kernel=all")
