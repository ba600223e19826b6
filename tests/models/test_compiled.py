"""Compiled."""

import pytest
import torch
from cases import CASES, FLUX, SD3
from features import enabled_with, forward
from test_contract import plan_of
from tiny_pipelines import TINY, generate
from torch._dynamo import lookup_backend

import accel
from accel.choice import DENSE, Choice
from accel.pattern import Window
from accel.schedule import Schedule

SCHEDULE = Schedule(dense_start=0.4, bands=(0.5,))
STEPS = 5


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self._compile = lookup_backend("aot_eager")
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return self._compile(graph, example_inputs)


def whole(model, backend):
    model.compile(fullgraph=True, backend=backend)


def blocks(model, backend):
    model.compile_repeated_blocks(fullgraph=True, backend=backend)


def compilable(case, how):
    """Skip where the untouched model cannot be compiled so; else its number of graphs."""
    model, backend = case.model(), Counting()
    if how is blocks:
        if not getattr(model, "_repeated_blocks", None):
            pytest.skip("the class has no _repeated_blocks")
    elif "compiled whole" in case.notes:
        pytest.skip(case.notes["compiled whole"])
    how(model, backend)
    try:
        run(model, case, 2)
    except torch._dynamo.exc.TorchDynamoException:
        pytest.skip("the model itself breaks the graph")
    return backend.graphs


def run(model, case, steps=STEPS):
    outs = []
    for step in range(steps):
        with accel.step(step, STEPS):
            outs.append(forward(model, case.inputs(samples=(0, 1), seed=step)))
    return outs


def close(outs, expected):
    return all(
        torch.allclose(a, b, atol=2e-4, rtol=2e-4) for a, b in zip(outs, expected, strict=True)
    )


def over_ways(*few):
    """Parametrise over models and ways to compile; those that are not among the `few` are slow."""
    names = {whole: "model.compile, fullgraph", blocks: "compile_repeated_blocks, fullgraph"}
    return pytest.mark.parametrize(
        ("case", "how"),
        [
            pytest.param(
                case,
                how,
                id=f"{case}-{how.__name__}",
                marks=[
                    pytest.mark.feature(name),
                    *([] if any(case is c and how is h for c, h in few) else [pytest.mark.slow]),
                ],
            )
            for case in CASES
            for how, name in names.items()
        ],
    )


@over_ways((FLUX, blocks), (SD3, whole))
def test_one_compilation_for_steps_plans_and_layers(case, how):
    """As many graphs as the untouched model has, whatever accel does; before and after."""
    graphs = compilable(case, how)
    plain = case.model()
    dense = run(plain, case)
    near = Choice(Window(h=0.4, w=0.2))
    plans = [plan_of(plain, *choices, schedule=SCHEDULE) for choices in ((), (near,), (DENSE,))]
    expected = [run(accel.enable(plain, p, guard=False, strict=True), case) for p in plans]
    torch.compiler.reset()

    # enabled before it is compiled
    model, backend = case.model(), Counting()
    accel.enable(model, plans[0], guard=False, strict=True)
    how(model, backend)
    assert close(run(model, case), expected[0])
    first = backend.graphs
    # a model that is compiled whole takes the start of the call for a graph by itself
    assert first <= graphs + (how is whole)
    for plan, outs in zip(plans[1:], expected[1:], strict=True):
        accel.enable(model, plan, guard=False, strict=True)
        assert close(run(model, case), outs)
    assert backend.graphs == first
    assert {r.calls for r in accel.summary(model).rows} <= {1, 2, 3, 4, 6}
    assert not accel.summary(model).notices

    # and disabled, and enabled again after that
    accel.disable(model)
    assert close(run(model, case), dense)
    again = backend.graphs
    accel.enable(model, plans[0], guard=False, strict=True)
    assert close(run(model, case), expected[0])
    assert backend.graphs == again


@over_ways()
def test_enabling_what_was_compiled(case, how):
    compilable(case, how)
    plain = case.model()
    dense = run(plain, case, 3)
    expected = run(enabled_with(plain, schedule=SCHEDULE), case, 3)
    torch.compiler.reset()
    model = case.model()
    how(model, "aot_eager")
    assert close(run(model, case, 3), dense)
    enabled_with(model, schedule=SCHEDULE)
    assert close(run(model, case, 3), expected)
    accel.disable(model)
    assert close(run(model, case, 3), dense)


@pytest.mark.slow
@pytest.mark.feature("steps are found, compiled whole")
@pytest.mark.parametrize(
    ("case", "name"),
    [(TINY[n].case, n) for n in ("CogVideoX, batched, DDIM", "DiT, batched, DDIM", "SD3, batched")],
    ids=str,
)
def test_the_step_of_a_compiled_pipeline(case, name):
    pipe, call = TINY[name].build()
    accel.enable(pipe, plan_of(pipe.transformer, schedule=SCHEDULE), strict=True, guard=False)
    expected = generate(pipe, call, STEPS)
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    assert torch.allclose(generate(pipe, call, STEPS), expected, atol=1e-2, rtol=1e-2)
    phases = {row.phase: row.calls for row in accel.summary(pipe).rows}
    assert phases == {"dense": 2, "band 0": 1, "band 1": 2}
