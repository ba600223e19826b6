"""Profiles that no model was needed for."""

import torch

from accel.blocking import Blocking
from accel.geometry import Geometry
from accel.layout import Layout
from accel.profile import Profile
from accel.recipes import Demand


def synthetic_profile(demand: Demand, geometry: Geometry, layout: Layout, seed=0) -> Profile:
    """Random numbers of the right shapes for all that a demand asks for."""
    generator = torch.Generator().manual_seed(seed)
    profile = Profile(demand.candidates, demand.orders, demand.precisions, layout, demand.asked)
    blocking = Blocking(layout, block=demand.block)
    for site in geometry.sites:
        for band in range(demand.schedule.n_bands):
            key, tables = (site.name, band), {}
            for names, rows in (
                (("errors", "head_errors", "recalls", "keeps"), demand.candidates),
                (("sparsities", "incoherences"), demand.orders),
                (("roundings",), demand.precisions),
            ):
                for name in names if rows else ():
                    tables[name] = torch.rand(len(rows), site.heads, generator=generator)
            profile.add(key, **tables)
            if demand.mass is not None:
                profile.mass_orders[site.name] = (demand.orders[-1],) * site.heads
                shape = (site.heads, blocking.q_blocks, blocking.kv_blocks)
                profile.add_mass(key, torch.rand(shape, generator=generator).softmax(-1))
    return profile
