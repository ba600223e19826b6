"""A model with dense attention under a mask: what a sparse plan has to give, without accel's help.

Attention is taken at `F.scaled_dot_product_attention` by a mode of torch, while a site's module
runs; every query sees the keys whose block the plan keeps, in float64.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from accel.blocking import Blocking
from accel.choice import Choice
from accel.layout import Layout
from accel.order import inverse


def allowed(choice: Choice, layout: Layout, block: tuple[int, int]) -> Tensor:
    """Which query of a sample may see which key `[tokens, tokens]`, padding included."""
    valid = layout.valid()
    bare = layout.without_padding()
    blocking = Blocking(bare, choice.order, block)
    keep = choice.select.mask(blocking, "cpu")
    order = blocking.indices()
    place = torch.arange(bare.length) if order is None else inverse(order)
    inside = keep[place // block[0]][:, place // block[1]]
    out = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    out[valid.nonzero(), valid.nonzero()[:, 0]] = inside
    return out


class Masked(TorchFunctionMode):
    """While the mode is on, the attention of sites is dense attention under their masks.

    layouts: for every site one layout for each sample; choices: one for each head.
    """

    def __init__(self, layouts, choices, block, by_sample):
        super().__init__()
        self.layouts, self.choices, self.block = layouts, choices, block
        self.by_sample = by_sample
        self.site = None
        self.turn = 0
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        site = self.site
        if func is not nn.functional.scaled_dot_product_attention or site is None:
            return func(*args, **kwargs)
        q, k, v = (x.double() for x in [*args, *kwargs.values()][:3])
        layouts = self.layouts[site]
        if self.by_sample and len(layouts) > 1:
            layouts, self.turn = [layouts[self.turn]], self.turn + 1
        assert [x.length for x in layouts] == [q.shape[2]] * q.shape[0]
        self.calls.append(site)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        mask = torch.stack(
            [torch.stack([allowed(c, x, self.block) for c in self.choices]) for x in layouts]
        )
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        # a query that sees nothing is padding
        return (scores.softmax(-1).nan_to_num() @ v).to(args[0].dtype if args else torch.float32)


@contextmanager
def masked(model: nn.Module, layouts, choices, block, by_sample=False):
    """The model's sites under masks; gives the list of the sites that were met."""
    mode = Masked(layouts, choices, block, by_sample)
    handles = []

    def enter(name):
        def hook(module, args, kwargs):
            mode.site, mode.turn = name, 0

        return hook

    def leave(module, args, out):
        mode.site = None

    for name in layouts:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with mode:
            yield mode.calls
    finally:
        for handle in handles:
            handle.remove()
