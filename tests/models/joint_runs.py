"""Models whose text and images are in one sequence, of which every rank has a part."""

import logging

import cases
import torch
from diffusers import ContextParallelConfig

import accel
from accel.choice import Choice
from accel.estimators import Pooled
from accel.pattern import Window
from accel.pipelines.adapters import geometry_of
from accel.plan import Plan
from accel.schedule import Schedule

# padding and reference images in some of them; Wan2.2 has no text there, but times for each token
JOINT = {case.name: case for case in (cases.FLUX, cases.KONTEXT, cases.QWEN, cases.WAN22)}
MIXED = (Choice(Window(h=0.3, w=0.3)), Choice(Pooled(keep=0.2), "hilbert"), Choice(Window(h=0.1)))


@torch.no_grad()
def joint(rank, ranks, names):
    """By model: the output of one dense and one sparse call."""
    cases.PADDED = 12  # what two ranks divide
    logging.disable(logging.WARNING)
    found = {}
    for name in names:
        case = JOINT[name]
        model = case.model()
        given = case.inputs((3, 6, 8) if case.grids is cases.VIDEOS else (1, 12, 14))
        if ranks > 1:
            # heads are three
            config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=True)
            model.enable_parallelism(config=config)
        dense = model(**given, return_dict=False)[0]
        geometry = geometry_of(model)
        sites = {site.name: (MIXED,) for site in geometry.sites}
        plan = Plan.of(name, geometry, sites, block=(16, 16), schedule=Schedule(dense_start=0.0))
        accel.enable(model, plan, strict=True)
        with accel.step(0, 2):
            found[name] = dense, model(**given, return_dict=False)[0]
    return found
