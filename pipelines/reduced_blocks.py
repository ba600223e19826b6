"""Blocks of a vision transformer between whose attention and MLP tokens are merged, or fused.

All else is the block's own: attention is its module, with the sizes of the tokens as an additive
mask, and the keys are seen at its SDPA call. The last block and every tap give all patches back, so
norms, pooling and heads see what they know. A compiled model stays one graph.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from accel.errors import AccelError
from accel.geometry import Site
from accel.intercept import REDUCE, copy_plainly
from accel.pipelines.block_parts import Halves, halves_of
from accel.pipelines.seen_calls import Seen, SeenCalls
from accel.pipelines.token_state import States
from accel.records import Record, Stopwatch, phase_label
from accel.router import Session
from accel.token_groups import Groups, Step, fuse, left, match
from accel.token_reduction import TokenReduction
from accel.token_scores import class_scores, mass_scores

__all__ = ["ReducedBlocks"]

TAPS = "forward_intermediates"


class _Block(NamedTuple):
    """names: of the arguments of its `forward`; before: what stood in its place on the instance."""

    number: int
    site: Site
    module: Any
    halves: Halves
    own: Callable[..., Tensor]
    names: tuple[str, ...]
    before: Any


class ReducedBlocks:
    """The blocks of one model whose tokens a plan reduces. `undo` puts everything back.

    always: blocks take the way of reduced ones even where every patch stands for itself (a check of
    exactness). The summary knows eager calls; of a compiled graph nothing is told.
    """

    def __init__(self, session: Session, modules: dict[Site, nn.Module], model: Any) -> None:
        self.always = False
        self._model = model
        self._taps: frozenset[int] = frozenset()
        self._states = States()
        self._blocks: list[_Block] = []
        self.serve(session)
        for number, site in enumerate(modules):
            name = site.name.rpartition(".")[0]
            block = model.get_submodule(name)
            names = tuple(signature(type(block).forward).parameters)[2:]
            before = block.__dict__.get("forward")
            halves = halves_of(name, block)
            self._blocks.append(_Block(number, site, block, halves, block.forward, names, before))
        for taken in self._blocks:
            taken.module.__dict__["forward"] = partial(self._forward, taken)
            copy_plainly(taken.module, "forward")
        model.__dict__[TAPS] = partial(self._tapped, getattr(model, TAPS))
        copy_plainly(model, TAPS)

    def serve(self, session: Session) -> None:
        """Hand the blocks to another session."""
        assert session.plan.tokens is not None
        self.session = session
        self._how: TokenReduction = session.plan.tokens

    def undo(self) -> None:
        for taken in self._blocks:
            taken.module.__dict__.pop("forward", None)
            taken.module.__dict__.pop(REDUCE, None)
            if taken.before is not None:
                taken.module.__dict__["forward"] = taken.before
        self._model.__dict__.pop(TAPS, None)

    @property
    def intact(self) -> bool:
        """Whether every block is still called as it was taken."""
        return all("forward" in taken.module.__dict__ for taken in self._blocks)

    def _tapped(
        self, own: Callable[..., Any], x: Tensor, indices: Any = None, *rest: Any, **more: Any
    ) -> Any:
        """`forward_intermediates`: the blocks that it collects give all patches."""
        from timm.models._features import feature_take_indices

        self._taps = frozenset(feature_take_indices(len(self._model.blocks), indices)[0])
        try:
            return own(x, indices, *rest, **more)
        finally:
            self._taps = frozenset()
            self._states.end()

    def _forward(self, taken: _Block, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        session, how = self.session, self._how
        if session.probe is not None:
            session.probe[taken.site.name] += 1
            return taken.own(x, *args, **kwargs)
        eager = not torch.compiler.is_compiling()
        again = eager and (torch.is_grad_enabled() or self._model.grad_checkpointing)
        last = taken.module is self._model.blocks[-1]
        whole = last or taken.number in self._taps or self._is_watched(taken)
        entered = self._states.enter(taken.number, x, whole, again)
        groups, prefix = entered.groups, self._model.num_prefix_tokens
        tokens = x.shape[1] - prefix if groups is None else groups.count
        patches = tokens if groups is None else groups.source.shape[1]
        keep = how.keeps.get(taken.site.name, 1.0)
        count = tokens
        if keep < 1:
            count = left(keep, patches, tokens, halves=how.method == "merge")
        calls = _Recorded(session, taken.site) if eager else SeenCalls()
        if groups is None and count == tokens and not self.always:
            with calls:
                out = taken.own(x, *args, **kwargs)
        else:
            groups = Groups.each(x, prefix) if groups is None else groups
            x = groups.taken(x) if entered.spread else x
            call = {**dict(zip(taken.names, args, strict=False)), **kwargs}
            with calls:
                x = taken.halves.attend(taken.module, x, **_reduced(call, groups, how, x.dtype))
            if count < tokens or self.always:
                x, groups = _passed(x, groups, calls.last, how, count)
            out = taken.halves.feed(taken.module, x)
            out = groups.spread(out) if entered.whole else out
        if isinstance(calls, _Recorded):
            word = how.method if count < tokens else "dense"
            calls.tell(word, (tokens + prefix) / (patches + prefix))
        if last:
            self._states.end()
        else:
            self._states.leave(taken.number, groups, whole=entered.whole)
        return out

    def _is_watched(self, taken: _Block) -> bool:
        """Whether hooks look at what a block gives."""
        if taken.module._forward_hooks:
            return True
        behind = self._blocks[taken.number + 1 : taken.number + 2]
        return any(block.module._forward_pre_hooks for block in behind)


def _reduced(
    call: dict[str, Any], groups: Groups, how: TokenReduction, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of a block's attention for tokens that stand for groups."""
    mask = call.get("attn_mask")
    if call.get("is_causal"):
        length = groups.prefix + groups.source.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=groups.size.device).tril()
    bias = groups.bias(mask, proportional=how.proportional)
    call = {**call, "attn_mask": None if bias is None else bias.to(dtype), "is_causal": False}
    if call.get("rope") is not None:
        call["rope"] = groups.rope(call["rope"])
    return call


def _passed(
    x: Tensor, groups: Groups, seen: Seen | None, how: TokenReduction, count: int
) -> tuple[Tensor, Groups]:
    """What a block passes from its attention to its MLP: so many tokens, and their groups."""
    if seen is None:
        raise AccelError(
            "a block's attention made no scaled_dot_product_attention call, so its keys are"
            " unknown; build the model with timm.layers.set_fused_attn(True)"
        )
    with torch.autocast(x.device.type, enabled=False):
        step = _step(groups, seen, how, count)
        first, rest = groups.split(x)
        return torch.cat([first, step.reduce(rest)], 1), groups.after(step)


def _step(groups: Groups, seen: Seen, how: TokenReduction, count: int) -> Step:
    if how.method == "merge":
        return match(seen.k.mean(1)[:, groups.prefix :], groups.size, count)
    if how.score == "class":
        scores = class_scores(seen.q, seen.k, scale=seen.scale, bias=seen.mask)
    else:
        size = nn.functional.pad(groups.size, (groups.prefix, 0), value=1.0)
        weights = size if how.proportional else None
        more = {"bias": seen.mask, "weights": weights}
        scores = mass_scores(seen.q, seen.k, scale=seen.scale, **more)
    return fuse(scores[:, groups.prefix :], count)


class _Recorded(SeenCalls):
    """Calls that the summary knows: which share of queries and keys they have, and their time."""

    def __init__(self, session: Session, site: Site) -> None:
        super().__init__()
        key = (site.name, phase_label(session.run.phase.band))
        self._record = session.records.setdefault(key, Record())

    def call(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        watch = Stopwatch(self._record, device)
        out = make()
        watch.stop()
        return out

    def tell(self, word: str, share: float) -> None:
        """word: what the block did; share: of the tokens that its attention saw."""
        self._record.calls += 1
        self._record.keep += share**2
        self._record.kernels.add(word)
