"""Two pipelines in two threads never meet."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from diffusers import WanPipeline
from tiny_wan import CALL

import accel

TIMEOUT_S = 120


def _pipe(path, plan):
    pipe = WanPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    parameters = {"dense_start": 0.25, "block": (32, 16)}
    plan = accel.recipe(plan, _geometry(pipe), **parameters)
    return accel.enable(pipe, plan, guard=False)  # it decides by time


def _geometry(pipe):
    from accel.pipelines.adapters import geometry_of

    return geometry_of(pipe)


def _generate(pipe, seed, at_step=lambda: None):
    def callback(pipe, step, timestep, tensors):
        at_step()
        return tensors

    # a thread begins with its own number of torch's, and how a sum is split rounds it
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a seven moving left",
        generator=generator,
        output_type="latent",
        callback_on_step_end=callback,
        **CALL,
    ).frames


def test_pipelines_step_by_step_in_two_threads_give_what_each_gives_alone(tiny_wan_path):
    pipes = [_pipe(tiny_wan_path, plan) for plan in ("sparsed", "pisa")]
    alone = [_generate(pipe, seed) for seed, pipe in enumerate(pipes)]
    tables = [_calls(pipe) for pipe in pipes]
    barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_generate, pipe, seed, lambda: barrier.wait(TIMEOUT_S))
            for seed, pipe in enumerate(pipes)
        ]
        together = [job.result(TIMEOUT_S) for job in jobs]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other), f"apart by {(one - other).abs().max()}"
    assert not torch.equal(*together)
    assert [_calls(pipe) for pipe in pipes] == tables


def test_a_plan_in_one_thread_leaves_a_plain_pipeline_in_another_alone(tiny_wan_path):
    sparse, plain = _pipe(tiny_wan_path, "sparsed"), _pipe(tiny_wan_path, "sparsed")
    accel.disable(plain)
    alone = [_generate(pipe, 0) for pipe in (sparse, plain)]
    barrier = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_generate, pipe, 0, lambda: barrier.wait(TIMEOUT_S))
            for pipe in (sparse, plain)
        ]
        together = [job.result(TIMEOUT_S) for job in jobs]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_interleaved_in_one_thread(tiny_wan_path):
    """A run inside a run, at every step of it."""
    outer, inner = (_pipe(tiny_wan_path, plan) for plan in ("adaspa", "sparsed"))
    alone = _generate(outer, 0), _generate(inner, 1)
    seen = []
    out = _generate(outer, 0, lambda: seen.append(_generate(inner, 1)))
    assert torch.equal(out, alone[0])
    assert len(seen) == CALL["num_inference_steps"]
    assert all(torch.equal(x, alone[1]) for x in seen)


def _calls(pipe):
    return [(r.site, r.phase, r.calls, r.keep, r.recall) for r in accel.summary(pipe).rows]
