"""A denoising step small enough for a processor, by the code that measures the large one."""

from types import SimpleNamespace

import pytest
import torch
from bench_cases import config

from accel.errors import AccelError
from accel.pipelines import bench_wan_step
from accel.pipelines.bench import bench
from accel.pipelines.bench_table import as_text
from accel.pipelines.bench_wan_model import WanStep, random_step
from accel.pipelines.bench_wan_step import step_rows
from accel.records import Record

TINY = {
    "layers": 2, "heads": 3, "head_dim": 24, "ffn_dim": 48, "latents": [1, 4, 3, 10, 14],
    "text": [5, 16], "keep": 0.5, "dtype": "float32",
}  # fmt: skip
CPU = torch.device("cpu")


def test_dense_and_sparse_steps_are_measured():
    dense, sparse = step_rows(WanStep.of(TINY), CPU, rounds=2)
    assert (dense.backend, dense.mode, dense.baseline) == ("sdpa", "dense", "sdpa")
    assert (sparse.backend, sparse.mode, sparse.keep) == ("accel", "sparse", 0.5)
    for row in (dense, sparse):
        assert (row.heads, row.tokens, row.dim) == (3, 3 * 5 * 7, 24)
        assert row.ms["median"] > 0
        assert 0 < row.share < 1
    # one of the two blocks of keys, in every step
    assert (dense.kept, sparse.kept) == (1.0, 0.5)
    assert dense.price == 1
    assert sparse.price > 0
    assert sparse.error < 1e-5
    assert "in attention" in as_text([dense, sparse])


def test_the_share_is_that_of_the_step_that_is_timed(monkeypatch):
    def in_turns(jobs, device, rounds):
        for job in jobs.values():
            for _ in range(1 + rounds):
                job()
        return {name: [2.0] for name in jobs}

    records = {"a": Record(calls=2, seconds=[7.0, 0.25]), "b": Record(calls=2, seconds=[7.0, 0.75])}
    monkeypatch.setattr(bench_wan_step, "in_turns", in_turns)
    monkeypatch.setattr(bench_wan_step, "session_of", lambda _: SimpleNamespace(records=records))
    for row in step_rows(WanStep.of(TINY), CPU, rounds=1):
        assert (row.share, row.ms["median"]) == (0.5, 2000.0)


def test_a_wrong_kernel_gives_no_time(monkeypatch):
    monkeypatch.setattr(bench_wan_step, "_distance", lambda *_: 0.3)
    dense, sparse = step_rows(WanStep.of(TINY), CPU, rounds=1)
    assert dense.ms
    assert sparse.ms is sparse.price is sparse.share is None
    assert "with every block kept its error is 3.0e-01" in sparse.note


def test_a_dense_attention_that_fails_is_a_row(monkeypatch):
    class Refuses:
        def __enter__(self):
            raise RuntimeError("no kernel")

        def __exit__(self, *_):
            pass

    contexts = bench_wan_step._dense_contexts(CPU)
    monkeypatch.setattr(
        bench_wan_step, "_dense_contexts", lambda _: {"sdpa-cudnn": Refuses, **contexts}
    )
    refused, dense, sparse = step_rows(WanStep.of(TINY), CPU, rounds=2)
    assert refused.note == "RuntimeError: no kernel"
    assert refused.ms is None
    assert dense.baseline == sparse.baseline == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_born_in_their_dtype(dtype):
    name = str(dtype).removeprefix("torch.")
    step = random_step(WanStep.of({**TINY, "dtype": name}), CPU)
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
        ({"dtype": "int8"}, "wan_step.dtype is 'int8'; take one of"),
        ({"heds": 3}, "wan_step.heds is unknown; did you mean 'heads'?"),
    ],
)
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(AccelError, match=message):
        WanStep.of({**TINY, **change})


def test_a_processor_is_refused(tmp_path):
    with pytest.raises(AccelError, match="kernel=wan_step needs a GPU, and the device is cpu"):
        bench(config("kernel=wan_step", f"out={tmp_path}"), "")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    values = config("kernel=wan_step", "device=cuda", f"out={tmp_path}")
    bench({**values, "wan_step": {**TINY, "dtype": "bfloat16", "head_dim": 64}}, "")
    assert (tmp_path / "wan-step.json").is_file()
