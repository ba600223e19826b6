"""Enabled models compile without a break, and into as many graphs as the untouched model.

What decides between dense and sparse sits behind opaque operations, so steps, plans and layers are
nothing to the compiler. These tests run under the type-checking import hook like all others.
"""

import functools

import pytest
import torch
from tiny_denoiser import GRID, LAYERS, call, inputs, tiny_geometry, tiny_plan
from tiny_denoiser import tiny_denoiser as build
from torch._dynamo import lookup_backend

import accel
from accel.choice import Choice
from accel.estimators import BlockMassTopK
from accel.kernels.attention import resolve_backend
from accel.pattern import Window
from accel.plan import Plan
from accel.schedule import Schedule

SCHEDULE = Schedule(dense_start=0.2, bands=(0.5,), refresh=(0.7,))
SPARSE = Choice(BlockMassTopK(keep=0.3))
STEPS = 20
# calls of a few microseconds: what is measured of them decides nothing
enable = functools.partial(accel.enable, guard=False)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend="aot_eager"):
        self._compile = lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return self._compile(graph, example_inputs)


def whole(model, backend):
    return torch.compile(model, fullgraph=True, backend=backend)


def blocks(model, backend):
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


def in_place(model, backend):
    model.compile(fullgraph=True, backend=backend)
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model, steps=STEPS):
    outs = []
    for step in range(steps):
        arguments = {**inputs(seed=step), "timestep": torch.full((1,), 1000 - 10 * step)}
        outs.append(call(model, step, steps, **arguments))
    return outs


def plan_of(model, choice=SPARSE):
    geometry = tiny_geometry(model)
    return Plan.uniform("all", geometry, choice, schedule=SCHEDULE, block=(32, 16))


def close(outs, expected):
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outs, expected, strict=True))


@functools.cache
def baseline(compiled):
    """Graphs of the untouched model.

    The compiler takes the forward pre-hook of a model by itself: one graph of one operation, the
    start of a call.
    """
    backend = Counting()
    torch.compiler.reset()
    run(compiled(build(), backend), 3)
    return backend.graphs + (compiled is not blocks)


@pytest.mark.parametrize("compiled", [whole, in_place, blocks])
def test_compiled_agrees_with_eager(compiled):
    plan = tiny_plan(SPARSE, schedule=SCHEDULE)
    expected = run(enable(build(), plan))
    backend = Counting()
    model = enable(build(), plan)
    assert close(run(compiled(model, backend)), expected)
    assert backend.graphs == baseline(compiled)
    phases = {(r.phase, r.kernels) for r in accel.summary(model).rows}
    kernel = resolve_backend("auto", torch.device("cpu"))
    assert phases == {("dense", ("dense",)), ("band 0", (kernel,)), ("band 1", (kernel,))}


@pytest.mark.parametrize("compiled", [whole, blocks])
def test_graphs_do_not_grow_with_steps_and_plans(compiled):
    backend, plain = Counting(), build(num_layers=1)
    model = compiled(enable(build(num_layers=1), plan_of(plain)), backend)
    run(model, 2)
    first = backend.graphs
    for choice in (Choice(Window(t=0)), Choice(Window(h=0), "hwt", "mean"), SPARSE):
        plan = plan_of(plain, choice)
        enable(model, plan)
        outs = run(model)
        with torch.compiler.set_stance("force_eager"):
            assert close(outs, run(enable(plain, plan)))
    assert backend.graphs == first == baseline(compiled)


def test_layers_share_one_graph():
    backend = Counting()
    model = build(num_layers=2 * LAYERS)
    enable(model, plan_of(model))
    run(blocks(model, backend), 3)
    assert backend.graphs == baseline(blocks)


@pytest.mark.parametrize("compiled", [whole, blocks])
def test_enabling_after_compiling(compiled):
    plain = build(num_layers=1)
    plan = plan_of(plain)
    dense = run(plain, 6)
    expected = run(enable(plain, plan), 6)
    model = compiled(build(num_layers=1), "aot_eager")
    assert close(run(model, 6), dense)
    enable(model, plan)
    assert close(run(model, 6), expected)
    accel.disable(model)
    assert close(run(model, 6), dense)


@pytest.mark.parametrize("compiled", [whole, blocks])
def test_enabling_again_compiles_nothing(compiled):
    backend, plain = Counting(), build(num_layers=1)
    model, plan = compiled(build(num_layers=1), backend), plan_of(plain)
    expected, dense = run(enable(plain, plan), 5)[-1], run(build(num_layers=1), 5)[-1]
    graphs = []
    for _ in range(3):
        enable(model, plan)
        assert close(run(model, 5)[-1:], [expected])
        accel.disable(model)
        assert close(run(model, 5)[-1:], [dense])
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.mark.slow
def test_another_grid_is_a_new_run_in_a_compiled_model():
    plan = tiny_plan(Choice(Window(t=0)))
    model = whole(enable(build(), plan), "aot_eager")
    plain = enable(build(), plan)
    for grid in (GRID, (5, 3, 9), GRID):
        arguments = inputs(grid=grid)
        out = call(model, 0, **arguments)
        assert torch.allclose(out, call(plain, 0, **arguments), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [whole, blocks])
def test_inductor(compiled):
    plan = tiny_plan(SPARSE, schedule=SCHEDULE)
    expected = run(enable(build(), plan))
    model = compiled(enable(build(), plan), "inductor")
    for out, eager in zip(run(model), expected, strict=True):
        assert torch.allclose(out, eager, atol=1e-4)
