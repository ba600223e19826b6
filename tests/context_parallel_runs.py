"""Models whose calls ranks share, in runs that one process makes as well."""

import logging

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_denoiser import SITES, call, inputs, tiny_denoiser, tiny_geometry

import accel
from accel.choice import DENSE, Alternatives, Choice
from accel.estimators import AdaptiveBlockMass, BlockMassTopK, Joined, Pooled, Threshold
from accel.layout import Layout
from accel.pattern import FirstFrames, Identity, Share, Skip, Window
from accel.pipelines.enable import session_of
from accel.plan import Plan
from accel.schedule import Schedule

GRID = (3, 4, 8)  # 96 tokens; diffusers splits what the ranks divide, on gloo
BLOCK = (16, 16)
STEPS = 6
BANDS = Schedule(dense_start=0.2, dense_end=0.1, bands=(0.4,), refresh=(0.6,))
NEAR = Window(t=1, h=1, w=1)
MASS, POOLED = BlockMassTopK(keep=0.3), Pooled(keep=0.2)

# choices of the first heads, over and over; the second band has them backwards
CHOICES = {
    "patterns": (
        Choice(NEAR),
        Choice(Window(t=0)),
        DENSE,
        Choice(NEAR, "hilbert", "mean"),
        Choice(Skip()),
    ),
    "selections": (
        Choice(MASS),
        Choice(POOLED, "tile(1,2,4)"),
        Choice(Threshold(1.0)),
        DENSE,
        Choice(Alternatives((Choice(NEAR), Choice(MASS, "hwt")))),
        Choice(Joined(POOLED, FirstFrames(1))),
    ),
    "stand-ins": (
        Choice(Share("step")),
        Choice(Share("branch")),
        Choice(MASS),
        Choice(Identity()),
        Choice(NEAR),
    ),
    "drift": (Choice(MASS), Choice(NEAR), Choice(POOLED)),
    "recall": (Choice(MASS), Choice(Window(t=0)), Choice(POOLED), Choice(NEAR)),
    "kernel": (Choice(NEAR), Choice(POOLED)),
    "adaptive": (Choice(AdaptiveBlockMass(keep=0.4)),),
}
SETTINGS = {
    "drift": {"schedule": Schedule(dense_start=0.0, drift=0.95)},
    "recall": {"recall_floor": 0.6},
    "kernel": {"dense": "kernel"},
    "adaptive": {"schedule": Schedule(dense_start=0.0)},
}

# plans of which only calls tell what heads keep: a second run deals them otherwise
TWICE = ("selections", "recall")


def model_of(heads):
    return tiny_denoiser(num_attention_heads=heads)


def plan_of(model, name):
    geometry = tiny_geometry(model)
    heads = geometry.sites[0].heads
    choices = (CHOICES[name] * heads)[:heads]
    settings = {"block": BLOCK, "schedule": BANDS, **SETTINGS.get(name, {})}
    bands = (choices, choices[::-1])[: settings["schedule"].n_bands]
    return Plan.of(name, geometry, dict.fromkeys(SITES, bands), **settings)


def share(model, ranks, **settings):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks, **settings))
    return model


def generate(model):
    """The outputs of all steps and branches; tokens of a batch of two where branches are one."""
    outs = []
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            given = inputs(grid=GRID, seed=step // 2 + (branch == "uncond"))
            outs.append(call(model, step, STEPS, branch, **given))
    return torch.stack(outs)


def plain(heads):
    model = model_of(heads)
    outs = [call(model, **inputs(2, grid=GRID, seed=seed)) for seed in range(2)]
    return torch.stack(outs)


def looked_at(model):
    """What a run says of itself."""
    summary = accel.summary(model)
    rows = {(r.site, r.phase): (r.calls, r.keep, r.kernels) for r in summary.rows}
    return {"rows": rows, "dealt": dict(summary.dealt), "notices": summary.notices} | {
        "text": str(summary),
        "data": summary.to_dict(),
    }


def wan_alone(heads, names):
    """By plan, as one process has it."""
    model, found = model_of(heads), {}
    for name in names:
        accel.enable(model, plan_of(model, name), guard=False)
        found[name] = generate(model)
    return found


def wan_on_ranks(rank, ranks, heads, names, settings):
    """By plan: outputs, and what the summary says, of two runs with each."""
    logging.disable(logging.WARNING)
    model, found = share(model_of(heads), ranks, **settings), {}
    for name in names:
        accel.enable(model, plan_of(model, name), guard=False)
        outs = generate(model)
        first = looked_at(model)
        found[name] = {"outs": outs, "first": first, **first}
        if name in TWICE:
            found[name] |= {"again": generate(model), **looked_at(model)}
    accel.disable(model)
    dense = [call(model, **inputs(2, grid=GRID, seed=seed)) for seed in range(2)]
    accel.enable(model, plan_of(model, "patterns"))
    first = [call(model, 0, STEPS, **inputs(2, grid=GRID, seed=seed)) for seed in range(2)]
    found["dense"] = torch.stack(dense), torch.stack(first)
    return found


def edges(rank, ranks):
    """What goes otherwise: by name, whatever the test asks for."""
    logging.disable(logging.WARNING)
    found = {}
    # enabled before the ranks share the model, and after
    given = inputs(grid=GRID)
    before = accel.enable(model_of(4), plan_of(model_of(4), "selections"), guard=False)
    share(before, ranks)
    after = share(model_of(4), ranks)
    accel.enable(after, plan_of(after, "selections"), guard=False)
    found["order"] = [call(m, 3, STEPS, **given) for m in (before, after)]
    # one rank alone can enable: the self-check waits for nobody
    lonely = share(model_of(4), ranks)
    config, hooks = (
        lonely._parallel_config,
        [m.processor._parallel_config for m in attentions(lonely)],
    )
    if rank == 1:
        accel.enable(lonely, plan_of(lonely, "patterns"))
    same = [m.processor._parallel_config for m in attentions(lonely)] == hooks
    found["alone"] = same and lonely._parallel_config is config
    accel.enable(lonely, plan_of(lonely, "patterns"))
    found["together"] = call(lonely, 3, STEPS, **given)
    # layouts that are not those of the call
    wrong = {"long": Layout.of((3, 4, 9)), "text": Layout.of((3, 31, 1), text_before=3)}
    for name, layout in wrong.items():
        accel.enable(lonely, plan_of(lonely, "patterns"), layout=layout)
        session_of(lonely).shared.by_streams = lambda: True
        out = call(lonely, 3, STEPS, **given)
        found[name] = out, looked_at(lonely)["notices"]
    accel.disable(lonely)
    found["dense"] = call(lonely, **given)
    # a profile
    accel.enable(lonely, plan_of(lonely, "patterns"))
    session_of(lonely).observer = lambda *_: None
    found["observer"] = error_of(lambda: call(lonely, 3, STEPS, **given))
    # a ring
    ring = model_of(4)
    accel.enable(ring, plan_of(ring, "patterns"))
    ring.enable_parallelism(config=ContextParallelConfig(ring_degree=ranks))
    found["ring at the call"] = error_of(lambda: call(ring, 0, STEPS, **given))
    accel.disable(ring)
    found["ring"] = error_of(lambda: accel.enable(ring, plan_of(ring, "patterns")))
    found["ring leaves"] = "_accel" in ring.__dict__
    dist.barrier()
    return found


def attentions(model):
    return [block.attn1 for block in model.blocks]


def error_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


COMPILED = (0, 2, 4)


def compiled(rank, ranks):
    """Outputs of a model whose blocks are compiled, and the graphs that were made."""
    from torch._dynamo.utils import counters

    logging.disable(logging.WARNING)
    model = share(model_of(4), ranks)
    call(model, **inputs(grid=GRID))  # diffusers' hooks look their arguments up once
    accel.enable(model, plan_of(model, "selections"), guard=False)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    outs = [call(model, step, STEPS, **inputs(grid=GRID)) for step in COMPILED]
    return outs, counters["stats"]["unique_graphs"]
