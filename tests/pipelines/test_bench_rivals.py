"""Every rival gets the same mask: what it computes is what the reference computes of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CASE, qkv, settings

from accel.kernels import native
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import sparse_attention_reference
from accel.pipelines.bench import rivals as bench_rivals
from accel.pipelines.bench.inputs import per_head_order, random_mask
from accel.pipelines.bench.rivals import sparse_rivals

CPU = torch.device("cpu")


def error(run, inputs, mask):
    truth = sparse_attention_reference(*inputs, mask)
    return float((run(*inputs).double() - truth).norm() / truth.norm())


def test_every_backend_in_the_precisions_that_it_has():
    mask, (q, _, _) = random_mask(CASE, (64, 32), 0.4, "uneven", CPU), qkv()
    found = sparse_rivals(settings("precisions=[full,half]", "backends=null"), mask, q)
    assert list(found) == [
        ("native", "full"), ("native", "half"), ("cpu", "full"), ("cpu", "half"), ("flex", "full"),
    ]  # fmt: skip


@torch.no_grad()
def test_all_that_run_here_compute_the_mask():
    mask, inputs = random_mask(CASE, (64, 32), 0.4, "uneven", CPU), qkv()
    for (backend, _), rival in sparse_rivals(settings("backends=null"), mask, inputs[0]).items():
        if backend != "native" or native.available():
            assert error(rival.make(), inputs, mask) < 1e-5, backend


def test_those_of_others_say_what_they_cannot():
    mask, (q, _, _) = random_mask(CASE, (64, 32), 0.4, "uneven", CPU), qkv()
    asked = settings("backends=[cpu,flex]", "order=per_head", "rest=taylor")
    ours, theirs = sparse_rivals(asked, mask, q, per_head_order(CASE, CPU)).items()
    assert ours[0] == ("cpu per_head taylor", "full")
    assert ours[1].make().keywords["order"].shape == (3, 301)
    with pytest.raises(NotImplementedError, match="it has no order=per_head and no rest=taylor"):
        theirs[1].make()


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    mask = random_mask(CASE, (64, 32), 0.4, "uniform", CPU)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler is to be found"):
        sparse_rivals(settings(), mask, qkv()[0])["native", "full"].make()


class Wrapper:
    """FlashInfer's class as its documentation describes it, on the reference."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, kept, rows, columns, q_heads, kv_heads, dim, *, q_data_type):
        assert (q_heads, kv_heads, dim, q_data_type) == (6, 6, 40, torch.float32)
        assert rows.dtype == columns.dtype == torch.int32
        assert kept.shape == (q_heads, rows.shape[1], columns.shape[1])
        assert rows.shape[0] == columns.shape[0] == q_heads
        assert (rows.sum(1) == 301).all()
        assert (columns.sum(1) == 301).all()
        self.mask = BlockMask.from_dense(
            kept, block=(int(rows[0, 0]), int(columns[0, 0])), q_length=301, kv_length=301
        )

    def run(self, q, k, v):
        assert q.shape == (6, 301, 40)
        return sparse_attention_reference(*(x[None] for x in (q, k, v)), self.mask)[0]


def test_flashinfer_gets_a_mask_of_every_head(monkeypatch):
    fake = SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    mask, inputs = random_mask(CASE, (64, 32), 0.4, "uneven", CPU), qkv()
    run = bench_rivals.OTHERS["flashinfer"](mask, inputs[0])
    assert error(run, inputs, mask) < 1e-12


def test_without_flashinfer_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    mask = random_mask(CASE, (64, 32), 0.4, "uniform", CPU)
    with pytest.raises(ImportError, match="flashinfer"):
        bench_rivals.OTHERS["flashinfer"](mask, qkv()[0])
