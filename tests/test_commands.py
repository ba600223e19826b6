"""The commands as they are typed: their configurations, their help, and what goes wrong in them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tiny_wan import tiny_wan_config

from accel.command import hydra_version
from accel.pipelines.compare import compare
from accel.pipelines.generate import generate
from accel.pipelines.model_settings import model_config
from accel.plan import Plan
from accel.search.__main__ import OF_FRAMES, search

COMMANDS = {
    "accel-compare": "accel.pipelines.compare",
    "accel-generate": "accel.pipelines.generate",
    "accel-bench": "accel.pipelines.bench",
    "accel-search": "accel.search",
}
GROUPS = {
    "accel-compare": ("model", "experiment"),
    "accel-generate": ("model",),
    "accel-bench": ("shapes",),
    "accel-search": ("model", "space", "hardware"),
}
CHECKOUT = Path(__file__).parent.parent


def configured(name, tiny, out, *overrides):
    """The configuration of a command with the tiny model in place of the sample."""
    with initialize_config_module("accel.configs", version_base="1.3"):
        config = compose(name, overrides=[*overrides, f"out={out}"])
    values = OmegaConf.to_container(config, resolve=True)
    if tiny is not None:
        values["model"] = tiny_wan_config(tiny)
    return values


@pytest.mark.parametrize("experiment", ["demo", "wan-digits", "llada-tiny"])
def test_the_comparisons_of_the_readme_are_configured(experiment, tmp_path):
    config = configured("compare", None, tmp_path, f"experiment={experiment}")
    assert (CHECKOUT / config["plan"]).is_file()
    assert (CHECKOUT / config["model"]["path"]).is_dir()
    assert len(model_config(config["model"]).prompts) >= config["prompts"]


def test_demo_and_the_whole_comparison_keep_apart():
    with initialize_config_module("accel.configs", version_base="1.3"):
        folders = {
            compose("compare", overrides=[f"experiment={name}"]).out
            for name in ("demo", "wan-digits")
        }
    assert len(folders) == 2


def test_compare_writes_results_table_and_report(tiny_wan_path, tmp_path, capsys):
    overrides = ["recipes=[window]", "prompts=1", "rounds=1", "dtype=float32", "predict=false"]
    config = configured("compare", tiny_wan_path, tmp_path, *overrides, "baselines=[dense]")
    compare(config, "accel-compare")
    assert "report: " in capsys.readouterr().out
    for name in ("results.json", "results.md", "report.html", "trade-off.svg"):
        assert (tmp_path / name).is_file()


def test_search_writes_the_plan(tiny_wan_path, tmp_path, capsys):
    overrides = [
        *("cost_rounds=1", "rows=16", "block=[32,32]", "budget.time=1.0", "points=2"),
        *("search.trials=3", "search.population=2", "search.steps=3", "dense_starts=[]"),
    ]
    config = configured("search", tiny_wan_path, tmp_path, *overrides)
    search(config | {"schedule": {"dense_start": 0.25}})
    for name in ("plan.json", "front.json", "front.png", "heads.png", "study.log"):
        assert (tmp_path / name).is_file()
    said = capsys.readouterr().out
    assert "plan: " in said
    assert "it would generate in" in said


def test_search_makes_the_plan_of_a_recipe(tiny_wan_path, tmp_path, capsys):
    config = configured("search", tiny_wan_path, tmp_path, "recipe=window", "+parameters.t=1")
    search(config)
    assert Plan.load(tmp_path / "window.json").provenance["recipe"] == "window"
    assert "window.json" in capsys.readouterr().out


def test_hydra_is_asked_for_what_it_wants(monkeypatch):
    """1.3 warns when version_base is not given, 1.4 when it is."""
    for version, wanted in (("1.3.8", "1.3"), ("1.4.0rc3", None), ("2.0.0", None)):
        monkeypatch.setattr("hydra.__version__", version)
        assert hydra_version() == wanted


def test_generate_writes_a_video(tiny_wan_path, tmp_path):
    config = configured(
        "generate", tiny_wan_path, tmp_path / "v.gif", "prompt=a two", "plan=window"
    )
    generate(config)
    assert (tmp_path / "v.gif").stat().st_size > 100


WRONG = {
    ("compare", "rounds=1.5"): "rounds is 1.5; it is a whole number, at least 1",
    ("compare", "timing_prompts=0"): "timing_prompts is 0; it is a whole number, at least 1",
    ("compare", "seed=x"): "seed is 'x'; it is a whole number, at least 0",
    ("compare", "arms_timeout_s=soon"): "arms_timeout_s is 'soon'; it is a number of seconds",
    ("compare", "model.device=gpu"): "model.device is 'gpu', which cannot be used here",
    ("compare", "~model.call.num_inference_steps"): "model.call.num_inference_steps is None",
    ("search", "cost_rounds=0"): "cost_rounds is 0; it is a whole number, at least 1",
    ("search", "rows=1.5"): "rows is 1.5; it is a whole number, at least 1",
    ("search", "tolerance=no"): "tolerance is 'no'; it is a number, at least 0",
    ("search", "block=[48,64]"): "block must be two powers of two from 16",
    ("search", "block=64"): "block must be two powers of two from 16",
    ("bench", "rounds=0"): "rounds is 0; it is a whole number, at least 1",
    ("bench", "dtype=nn"): "dtype 'nn' is unknown; Known: bfloat16, float16, float32",
    ("bench", "device=gpu"): "device is 'gpu', which cannot be used here",
    ("bench", "device=meta"): "device is 'meta'; accel-bench measures cpu and cuda",
    ("bench", "kernel=atention"): "kernel 'atention' is unknown; did you mean 'attention'?",
    ("bench", "kernel=wanstep"): "kernel 'wanstep' is unknown; did you mean 'wan_step'?",
    ("bench", "kernel=mass"): "unknown; did you mean 'block_mass'?",
    ("bench", "kernel=[wan_step]"): "wan_step stands alone, as in kernel=wan_step",
    ("bench", "kernel=[all,attention]"): "all stands alone, as in kernel=all",
    ("bench", "backends=[triton]"): "backends 'triton' is not for this device, which is cpu; take",
    ("bench", "backends=[tritn]"): "backends 'tritn' is unknown; did you mean 'triton'?",
    ("bench", "precisions=fp8"): "precisions 'fp8' is not for this device, which is cpu; take some",
    ("bench", "order=thw"): "order 'thw' is unknown; Known: natural, per_head",
    ("bench", "rest=meen"): "rest 'meen' is unknown; did you mean 'mean'?",
    ("bench", "page=samples"): "page is 'samples'; it is a file to write, with a name that ends",
    ("bench", "page=bench.json"): "page is 'bench.json'; it is a file to write, with a name that",
    ("bench", "page=no/such/folder/cpu.md"): "there is no folder 'no/such/folder'; make it",
    ("bench", "rows=[]"): "rows is []; it is a word or a list of words of ['uniform', 'uneven']",
    ("bench", "blocks=[[64,65]]"): "block must be two powers of two from 16",
    ("bench", "blocks=64"): "blocks is 64; it is a list of pairs, as in blocks=[[128,64]]",
    ("bench", "keeps=[1.5]"): "keeps holds 1.5; a keep is a fraction in (0, 1]",
    ("bench", "keeps=0.5"): "keeps is 0.5; it is a list of fractions",
    ("bench", "limit_s=soon"): "limit_s is 'soon'; it is a number, at least 0",
    (
        "bench",
        "+shapes.mine={tokens: 64}",
    ): "shapes has mine beside the shapes of each device",
    ("bench", "shapes=none"): "shapes is {}; choose a group as in shapes=real",
    ("bench", "+shapes.cpu.mine={tokens: 64}"): "shapes.mine.heads is None; it is a whole number",
    ("bench", "+shapes.cpu.mine={toks: 64}"): "shapes.mine.toks is unknown; did you mean 'tokens'",
    (
        "bench",
        "shapes.cpu.wan-digits.dim=300",
    ): "shapes.wan-digits.dim is 300; kernels take",
    ("bench", "tune=true"): "tune=true is for the Triton kernels of GPUs, and the device is cpu",
    ("bench", "tune=maybe"): "tune is 'maybe'; it is true or false",
    ("bench", "kernel=wan_step"): "kernel=wan_step needs a GPU, and the device is cpu",
}
# a process without the type checks of the tests, which would be faster
SAY_WHAT_IS_WRONG = """
import json, sys
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from accel.errors import AccelError
from accel.pipelines.bench import bench
from accel.pipelines.compare import compare
from accel.search.__main__ import OF_FRAMES, search

told = {"bench": bench, "compare": compare}
jobs = {name: lambda config, job=job: job(config, "") for name, job in told.items()}
jobs["search"] = search
said = []
with initialize_config_module("accel.configs", version_base="1.3"):
    for name, override in json.loads(sys.argv[1]):
        device = ["device=cpu"] if name == "bench" and "device" not in override else []
        config = compose(name, overrides=[override, "out=" + sys.argv[2], *device])
        try:
            jobs[name](OmegaConf.to_container(config, resolve=True))
        except AccelError as error:
            said.append(str(error))
print(json.dumps(said))
"""


def test_bench_writes_results_and_a_plot(tmp_path):
    mine = "+shapes.mine={heads: 2, tokens: 150, dim: 16, dtypes: [float32]}"
    quick = ["backends=[cpu]", "rounds=1", "keeps=[0.5]", "warm_up_ms=0", "sample_ms=0"]
    said = run("accel-bench", "device=cpu", "shapes=none", mine, *quick, f"out={tmp_path}")
    assert said.returncode == 0, said.stderr
    assert "mine: 1 x 2 x 150 x 16, float32" in said.stdout
    assert {"bench.json", "mine-float32.svg"} <= {p.name for p in tmp_path.iterdir()}


def test_settings_are_checked_before_anything_is_spent(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAY_WHAT_IS_WRONG, json.dumps(list(WRONG)), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=240,
        check=True,
    )
    for (_, override), message, said in zip(
        WRONG, WRONG.values(), json.loads(done.stdout), strict=True
    ):
        assert message in said, override
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    said = run(command, "--help")
    assert said.returncode == 0
    assert f"{command} " in said.stdout
    assert "Configuration" in said.stdout
    about = said.stdout.partition("== What can be chosen ==")[2].partition("== Configuration ==")[0]
    for group in GROUPS[command]:
        assert f"\n{group}: " in about
        for file in (CHECKOUT / "configs" / group).glob("*.yaml"):
            assert re.search(rf"\b{file.stem}\b", about), file


def test_settings_of_frames_are_told_from_others():
    told, above = {"hardware"}, ""
    for line in (CHECKOUT / "configs" / "search.yaml").read_text().splitlines():
        if found := re.match(r"(  )?(\w+):(.*)", line):
            inner, name, rest = found.groups()
            above = above if inner else name
            if "# of frames" in rest:
                told.add(f"{above}.{name}" if inner else name)
    assert told == set(OF_FRAMES)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("accel-compare", ["rounds=two"], "error: rounds is 'two'"),
        ("accel-compare", ["recipes=[7]"], "error: recipes is [7]"),
        ("accel-search", ["budget.time=half"], "error: budget.time is 'half'"),
        (
            "accel-search",
            ["model=llada-tiny", "space=text", "budget.time=0.5"],
            "error: budget.time does nothing in a search of a text model",
        ),
        (
            "accel-search",
            ["model=llada-tiny", "space=text", "cost_rounds=3"],
            "error: cost_rounds does nothing in a search of a text model",
        ),
        ("accel-bench", ["dtype=float64"], "error: dtype 'float64' is unknown"),
        (
            "accel-generate",
            ["prompt=a one", "model.path=no/such/model"],
            "error: model 'wan-digits'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, arguments, message, tmp_path):
    said = run(command, *arguments, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert said.returncode == 1
    assert message in said.stderr
    assert "Traceback" not in said.stderr


def run(command, *arguments, cwd=CHECKOUT):
    return subprocess.run(
        [sys.executable, "-m", COMMANDS[command], *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
        check=False,
    )
