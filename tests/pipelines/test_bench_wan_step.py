"""A denoising step small enough for a processor, by the code that measures the large one."""

import json

import pytest
import torch
from bench_cases import delivered

from accel.choice import DENSE
from accel.errors import AccelError
from accel.pipelines import enable
from accel.pipelines.adapters import geometry_of
from accel.pipelines.bench import bench
from accel.pipelines.bench import wan_step as bench_wan_step
from accel.pipelines.bench.results import Results
from accel.pipelines.bench.table import as_text
from accel.pipelines.bench.wan_model import WanStep, random_step
from accel.pipelines.bench.wan_step import measure_step
from accel.pipelines.pricing import dense_plan

TINY = {
    "layers": 2, "heads": 3, "head_dim": 24, "ffn_dim": 48, "latents": [1, 4, 3, 10, 14],
    "text": [5, 16], "keep": 0.5,
}  # fmt: skip
CPU = torch.device("cpu")
TINY_GEOMETRY = geometry_of(random_step(WanStep.of(TINY, "float32"), CPU).model)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "wan-step.json", CPU, {})


def step_rows(results, rounds=1):
    measure_step(WanStep.of(TINY, "float32"), CPU, rounds, results)
    return results.rows


def test_dense_and_sparse_steps_are_measured(results):
    dense, sparse = step_rows(results, rounds=2)
    assert (dense.backend, dense.mode, dense.baseline) == ("sdpa", "dense", "sdpa")
    assert (sparse.backend, sparse.mode, sparse.keep) == ("accel", "sparse", 0.5)
    for row in (dense, sparse):
        assert (row.heads, row.tokens, row.dim) == (3, 3 * 5 * 7, 24)
        assert row.ms["median"] > 0
        assert 0 < row.share < 1
        assert row.rounds == 2
    # one of the two blocks of keys, in every step
    assert (dense.kept, sparse.kept) == (1.0, 0.5)
    assert dense.price == 1
    assert sparse.price > 0
    assert sparse.error < 1e-5
    assert "in attention" in as_text([dense, sparse])


def test_the_share_is_that_of_the_step_that_is_timed(results, monkeypatch):
    """Every call of every site takes a quarter of a second of a step of two; there are two sites,
    and two steps of which the second is timed.
    """

    def in_turns(jobs, device, rounds):
        for job in jobs.values():
            for _ in range(1 + rounds):
                job()
        return {name: [2.0] for name in jobs}

    def session_of(model):
        session = enable.session_of(model)
        for record in session.records.values():
            record.seconds = [0.25] * record.calls
        return session

    monkeypatch.setattr(bench_wan_step, "in_turns", in_turns)
    monkeypatch.setattr(bench_wan_step, "session_of", session_of)
    for row in step_rows(results):
        assert (row.share, row.ms["median"]) == (0.25, 2000.0)


def test_a_wrong_kernel_gives_no_time(results, monkeypatch):
    monkeypatch.setattr(bench_wan_step, "_distance", lambda *_: 0.3)
    dense, sparse = step_rows(results)
    assert dense.ms
    assert sparse.ms is sparse.price is sparse.share is None
    assert "with every block kept its error is 3.0e-01" in sparse.note


@pytest.mark.parametrize("place", ["gate", "samples"])
def test_a_step_that_accel_left_to_others_is_an_error(place, results, monkeypatch):
    """Neither the check nor a time may be that of the model's own attention."""
    name = "recipe" if place == "gate" else "Choice"
    other = (lambda *_, **__: dense_plan(TINY_GEOMETRY)) if place == "gate" else lambda _: DENSE
    monkeypatch.setattr(bench_wan_step, name, other)
    with pytest.raises(AccelError, match=r"the step ran by \['dense'\], not by"):
        step_rows(results)


def test_rounds_are_kept_one_by_one(results, tmp_path, monkeypatch):
    with_plan, calls = bench_wan_step._with_plan, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return with_plan(*arguments)

    monkeypatch.setattr(bench_wan_step, "_with_plan", killed)
    with pytest.raises(KeyboardInterrupt):
        step_rows(results, rounds=3)
    again = Results(tmp_path / "wan-step.json", CPU, {})
    assert again.rows == []
    assert len(again.samples) == 2
    dense, sparse = step_rows(again, rounds=3)
    assert dense.rounds == sparse.rounds == 3
    # the round that was interrupted, and the share of the dense attention
    assert len(calls) == 3 + 2


def test_a_dense_attention_that_fails_is_a_row(results, monkeypatch):
    class Refuses:
        def __enter__(self):
            raise RuntimeError("no kernel")

        def __exit__(self, *_):
            pass

    contexts = bench_wan_step._dense_contexts(CPU)
    monkeypatch.setattr(
        bench_wan_step, "_dense_contexts", lambda _: {"sdpa-cudnn": Refuses, **contexts}
    )
    refused, dense, sparse = step_rows(results, rounds=2)
    assert refused.note == "RuntimeError: no kernel"
    assert refused.ms is None
    assert dense.baseline == sparse.baseline == "sdpa"


def test_a_hopeless_dense_attention_takes_no_turn(results, monkeypatch):
    in_turns = bench_wan_step.in_turns

    def slow(jobs, device, rounds):
        return {"slow": [9.0]} if [*jobs] == ["slow"] else in_turns(jobs, device, rounds=rounds)

    (context,) = bench_wan_step._dense_contexts(CPU).values()
    monkeypatch.setattr(
        bench_wan_step, "_dense_contexts", lambda _: {"slow": context, "sdpa": context}
    )
    monkeypatch.setattr(bench_wan_step, "in_turns", slow)
    slow_row, dense, _ = step_rows(results)
    assert slow_row.ms is None
    assert "its attention alone takes" in slow_row.note
    assert dense.ms
    assert dense.baseline == "sdpa"


def test_a_step_has_a_page(results, tmp_path, monkeypatch):
    def measured(config):
        step_rows(results)
        return results

    monkeypatch.setattr(bench_wan_step, "wan_step", measured)
    page = tmp_path / "step.md"
    bench(delivered("kernel=wan_step", f"out={tmp_path}", f"page={page}"), "accel-bench it")
    assert "| accel | 0.50 uniform |" in page.read_text()
    assert len(json.loads((tmp_path / "step.json").read_text())["rows"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_born_in_their_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    step = random_step(WanStep.of(TINY, name), CPU)
    assert {p.dtype for p in step.model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert step().isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "wan_step.layers is 0; it is a whole number, at least 1"),
        ({"latents": [1, 4, 3, 10]}, r"wan_step.latents is \[1, 4, 3, 10\]; it is a list of 5"),
        ({"latents": [1, 4, 3, 10, 13]}, "height and width are multiples of 2"),
        ({"text": [5, "x"]}, "wan_step.text is 'x'; it is a whole number"),
        ({"keep": 0}, r"wan_step.keep is 0; it is a fraction in \(0, 1\]"),
        ({"dtype": "float32"}, "wan_step.dtype is unknown"),
        ({"heds": 3}, "wan_step.heds is unknown; did you mean 'heads'?"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(AccelError, match=message):
        WanStep.of({**TINY, **change}, None)


@pytest.mark.parametrize("dtype", ["int8", ["float32", "bfloat16"]])
def test_it_has_one_dtype(dtype):
    with pytest.raises(AccelError, match="kernel=wan_step takes one of"):
        WanStep.of(TINY, dtype)
    assert WanStep.of(TINY, None).dtype == "bfloat16"


def test_a_processor_is_refused(tmp_path):
    with pytest.raises(AccelError, match="kernel=wan_step needs a GPU, and the device is cpu"):
        bench(delivered("kernel=wan_step", "device=cpu", f"out={tmp_path}"), "")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["keeps=[0.5]", "blocks=[[64,64]]"], "keeps, blocks"),
        (["tune=true", "precisions=[int8]"], "precisions, tune"),
        (["shapes=real"], "shapes"),
        (["order=per_head", "limit_s=11"], "order, limit_s"),
    ],
)
def test_what_it_does_not_read_is_an_error(overrides, said, monkeypatch):
    monkeypatch.setattr(bench_wan_step, "resolve_device", lambda *_: torch.device("cuda"))
    with pytest.raises(AccelError) as caught:
        bench(delivered("kernel=wan_step", *overrides), "")
    assert f"does not read {said}; leave" in str(caught.value)


def test_what_it_reads_is_none(monkeypatch):
    read = ["rounds=1", "dtype=float16", "wan_step.keep=0.5", "out=x", "page=y.md", "device=cuda"]
    bench_wan_step._check_unread(delivered("kernel=wan_step", *read))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    values = delivered("kernel=wan_step", "device=cuda", "rounds=2", f"out={tmp_path}")
    bench({**values, "wan_step": {**TINY, "head_dim": 64}}, "")
    assert (tmp_path / "wan-step.json").is_file()
