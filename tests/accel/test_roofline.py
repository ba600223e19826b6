from dataclasses import replace
from pathlib import Path

import pytest
from cost_cases import GEOMETRY, baseline, plan
from omegaconf import OmegaConf

from accel import configs
from accel.choice import Choice
from accel.cost import Shape, cost_sentence, price
from accel.cost_table import KEEPS
from accel.errors import AccelError
from accel.estimators import AdaptiveBlockMass, Antidiagonal, BlockMassTopK, Pooled
from accel.geometry import Geometry, Site
from accel.hardware import HERE, CostSource, Hardware
from accel.kernels.arguments import PRECISIONS
from accel.layout import Layout
from accel.plan import Plan
from accel.roofline import Work, roofline_baseline, roofline_table, seconds_of

FOLDER = Path(configs.__path__[0]) / "hardware"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GPUS = [name for name in NAMES if name != "auto"]
CHIP = Hardware(
    name="chip",
    sheet="a sheet",
    tflops={"float32": 10.0, "bfloat16": 100.0, "int8": 200.0, "fp8": 400.0},
    bandwidth_gb_s=1000.0,
    launch_us=10.0,
    dense=0.5,
    kernel=0.25,
    linear=0.8,
)
# Wan 14B at 720p
LARGE = Shape(75_600, 40, 128, "bfloat16", "cuda", (128, 64), batch=2)


def source(name, **more):
    config = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    return CostSource.of({**config, **more})


class TestRoofline:
    def test_products_decide(self):
        # 1 ms of products at the peak, half of which is reached, and 0.5 ms of memory
        work = Work(tensor_s=1e-3, bytes=5e8, launches=3)
        assert seconds_of(work, CHIP, 0.5) == pytest.approx(2e-3 + 30e-6)

    def test_memory_decides(self):
        assert seconds_of(Work(1e-3, 5e9, 1), CHIP, 0.5) == pytest.approx(5e-3 + 10e-6)

    def test_works_add_up(self):
        assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)


class TestTable:
    def test_dense_by_hand(self):
        table = roofline_table(LARGE, CHIP)
        operations = 4 * 2 * 40 * 75_600**2 * 128
        assert table.dense_ms.value == pytest.approx(1000 * operations / (0.5 * 100e12), rel=1e-3)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_rows_are_in_proportion_to_what_is_kept(self, precision):
        table = roofline_table(replace(LARGE, precision=precision), CHIP)
        # of the host's, which is in bf16 at half of the peak
        rate = {"full": 1, "half": 1, "int8": (1 + 1 / 2) / 2, "fp8": (1 / 2 + 1 / 4) / 2}
        for keep in (0.1, 0.4, 1.0):
            found = table.price(keep, "drop", False)
            assert found == pytest.approx(2 * keep * rate[precision], rel=1e-2)

    def test_a_device_without_8_bit_floats_takes_16_bits(self):
        rates = {"float32": 10.0, "bfloat16": 100.0, "int8": 200.0}
        without = replace(CHIP, tflops=rates)
        both = [
            roofline_table(replace(LARGE, precision=word), without).own_dense
            for word in ("int8", "fp8")
        ]
        assert both[0] == both[1]

    def test_fp32_is_slower_unless_16_bits_are_allowed(self):
        shape = replace(LARGE, dtype="float32")
        full, half = (
            roofline_table(replace(shape, precision=word), CHIP).own_dense
            for word in ("full", "half")
        )
        assert full == pytest.approx(10 * half, rel=1e-2)

    @pytest.mark.parametrize("name", GPUS)
    @pytest.mark.parametrize("shape", [LARGE, Shape(300, 3, 48, "float32", "cuda", (64, 32))])
    def test_what_every_table_has(self, name, shape):
        hardware = source(name).hardware
        estimators = (
            BlockMassTopK(keep=0.2),
            BlockMassTopK(keep=0.2, every=4),
            AdaptiveBlockMass(keep=0.2),
            Antidiagonal(tau=0.9, stride=8),
            Pooled(keep=0.2),
        )
        table = roofline_table(shape, hardware, estimators)
        assert table.source == "roofline"
        assert table.origin.device == hardware.name
        for row, prices in table.sparse.items():
            values = [p.value for p in prices]
            assert len(values) == len(KEEPS)
            assert values == sorted(values), row
        for keep in KEEPS:
            drop, mean, taylor = (
                table.price(keep, rest, False) for rest in ("drop", "mean", "taylor")
            )
            assert drop < mean < taylor
            assert drop <= table.price(keep, "drop", True)
        works = ("pooled", "block_mass/4", "block_mass")
        pooled, sampled, exact = (table.select[work].value for work in works)
        assert pooled <= sampled <= exact
        assert shape is not LARGE or pooled < sampled < exact
        assert set(table.again) == {"block_mass", "adaptive_block_mass"}
        assert table.again["block_mass"] <= table.select["block_mass"]

    def test_small_calls_are_all_launches(self):
        small = Shape(256, 2, 64, "bfloat16", "cuda", (64, 64))
        table = roofline_table(small, CHIP)
        assert table.price(0.05, "drop", False) == pytest.approx(1.0, rel=0.1)


class TestBaseline:
    def test_linear_layers_by_parameters_and_tokens(self):
        geometry = Geometry("M", tuple(Site(f"s{i}", 40, 128) for i in range(3)))
        layout = Layout.of((21, 45, 80))
        here = replace(baseline(), share={"s0": 0.1, "s1": 0.1, "s2": 0.1}, layout=layout)
        made = roofline_baseline(here, geometry, 10**9, "bfloat16", CHIP)
        assert made.source == "roofline"
        assert (made.layout, made.steps, made.branches, made.batch) == (layout, 10, 2, 1)
        attention = 4 * 40 * 75_600**2 * 128 / 50e12
        linear = 2 * 10**9 * 75_600 / 80e12
        assert made.attention["s1"] == pytest.approx(2 * attention, rel=1e-3)
        assert made.rest == pytest.approx(2 * linear, rel=1e-2)
        assert made.outside == 0
        assert made.seconds == pytest.approx(20 * (3 * attention + linear), rel=1e-2)

    def test_a_plan_is_priced_without_the_gpu_and_says_so(self):
        layout = Layout.of((21, 45, 80))
        hardware = source("h100-sxm").hardware
        base = roofline_baseline(
            replace(baseline(), layout=layout), GEOMETRY, 10**9, "bfloat16", hardware
        )
        made = plan(Choice(Pooled(keep=0.1)), dense_start=0.2)
        shape = Shape(layout.length, 2, 16, "bfloat16", "cuda", made.block)
        table = roofline_table(shape, hardware, (Pooled(keep=0.1),))
        expected = price(made, {"full": table}, base).expected
        assert expected["calibrated"] is False
        assert expected["device"] == "cuda"
        assert cost_sentence(expected).startswith(
            "uncalibrated: computed from the data sheet of NV"
        )
        assert 1 < expected["speedup"] < 10
        assert Plan.from_dict(replace(made, expected=expected).to_dict()).expected == expected


class TestHardware:
    @pytest.mark.parametrize("name", GPUS)
    def test_every_gpu_of_the_configuration(self, name):
        found = source(name)
        hardware = found.hardware
        assert found.table is None
        assert "data sheet" in hardware.sheet or "white paper" in hardware.sheet
        assert hardware.rate("float32") < hardware.rate("bfloat16") < hardware.rate("int8")
        with pytest.raises(AccelError, match=r"has no tflops of fp4 or float64; it has float32, "):
            hardware.rate("fp4", "float64")
        # figures with sparsity would be above these by two
        assert hardware.tflops["bfloat16"] <= 2250
        assert "uncalibrated" in (FOLDER / f"{name}.yaml").read_text()

    def test_this_device_is_the_default(self):
        assert source("auto") == HERE
        assert {"a100-80g", "b200", "h100-sxm", "h200", "l40s", "rtx-4090"} == set(GPUS)

    def test_a_table_of_elsewhere(self):
        found = source("auto", table="tables", foreign=True)
        assert found == CostSource(None, "tables", True)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"tflop": {}}, "did you mean 'tflops'"),
            ({"tflops": {"bfloat16": 1.0}}, "lacks the key 'float32'"),
            ({"tflops": {"float32": 1.0, "fp4": 2.0}}, "no key 'fp4'"),
            ({"tflops": {"float32": 0}}, "hardware.tflops.float32 is a number above 0"),
            ({"bandwidth_gb_s": float("nan")}, "hardware.bandwidth_gb_s"),
            ({"dense": 1.5}, "hardware.dense is a number in (0, 1]"),
            ({"sheet": ""}, "hardware.sheet is a text"),
            ({"table": 5}, "hardware.table is a folder"),
            ({"foreign": "yes"}, "hardware.foreign is true or false"),
            ({"foreign": True}, "hardware.foreign is about hardware.table"),
        ],
    )
    def test_what_a_configuration_may_not_say(self, change, words):
        with pytest.raises(AccelError) as error:
            source("h200", **change)
        assert words in str(error.value)

    def test_a_gpu_without_its_sheet_and_this_device_with_one(self):
        with pytest.raises(AccelError, match="'x' lacks bandwidth_gb_s, sheet, tflops"):
            CostSource.of({"name": "x"})
        with pytest.raises(AccelError, match="hardware=auto is measured; leave out tflops"):
            source("auto", tflops={"float32": 1.0})
