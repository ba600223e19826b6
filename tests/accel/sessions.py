"""A session by itself, and calls of it: random queries and keys, no model."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.choice import Choice
from accel.context import Where
from accel.estimators import BlockMassTopK
from accel.geometry import Geometry, Site
from accel.layout import Layout
from accel.pattern import Window
from accel.plan import Plan
from accel.router import Session
from accel.schedule import Schedule

LAYOUT = Layout.of((3, 4, 7))
A, B = Site("a", 2, 8), Site("b", 2, 8)
GEOMETRY = Geometry("M", (A, B))
PRICED = {"tokens": LAYOUT.length, "device": "cpu", "dtype": "float32"}  # the calls of `attend`
STATIC = Choice(Window(t=0))
ONLINE = Choice(BlockMassTopK(keep=0.5))


def session(*choices, strict=False, sites=(A, B), expected=None, **schedule):
    schedule = Schedule(**{"dense_start": 0.0, **schedule})
    heads = choices * 2 if len(choices) == 1 else choices
    plan = Plan(
        name="p",
        model="M",
        sites={s.name: (heads,) * schedule.n_bands for s in sites},
        n_sites=2,
        head_dim=8,
        schedule=schedule,
        block=(16, 16),
        expected=expected or {},
    )
    return Session(plan, GEOMETRY, strict=strict)


def qkv(batch=1, seed=0, tokens=84):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, 8, generator=generator) for _ in range(3))


def attend(session, site=A, tensors=None, obstacle=None):
    q, k, v = tensors or qkv()
    dense = scaled_dot_product_attention(q, k, v)
    return session.attend(site, q, k, v, lambda: dense, obstacle), dense


def run(session, steps, total=10, branches=("",), tensors=None, layout=LAYOUT, place=Where):
    outs = []
    for step in steps:
        for branch in branches:
            session.begin(layout, place(step, total, branch))
            outs += [attend(session, site, tensors)[0] for site in (A, B)]
    return outs


def place(timesteps, **more):
    """Places of a pipeline's run."""
    return lambda *where: Where(*where, run=timesteps, **more)
