"""The calls of a text model between whole ones, and what whole ones leave for them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.cached_tokens import SiteTokens, host_attention
from accel.errors import AccelError
from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.own_dense import full_mask
from accel.plan import Plan
from accel.records import CACHED_LABEL, DENSE_LABEL, Record, Stopwatch
from accel.run_state import Run
from accel.text_step import TextStep

__all__ = ["TextCalls"]

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]


class TextCalls:
    """The token cache of one plan at work; what it holds is in the run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def attend(
        self,
        site: Site,
        run: Run,
        step: TextStep,
        records: dict[tuple[str, str], Record],
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        valid: Bool[Tensor, "batch kv_tokens"] | None,
        dense: Callable[[], Heads],
        obstacle: str | None,
        kernel: Callable[[], str],
    ) -> Heads | None:
        """The output of a call that sees a cache, or keys that the model keeps itself; None for one
        with all tokens. dense, obstacle, valid: as the router has them; kernel: tells the name
        of accel's own.
        """
        if step.cached and obstacle is not None:
            raise AccelError(
                f"the cache of plan {self._plan.name!r} cannot honour the attention of {site.name}:"
                f" {obstacle}; take a plan without a cache"
            )
        if step.fed is not None:
            return self._fed(site, run, step, records, q, k, v, kernel())
        if step.beside:
            return self._beside(site, run, step, records, q, k, v, valid, dense, kernel())
        return None

    def _fed(
        self,
        site: Site,
        run: Run,
        step: TextStep,
        records: dict[tuple[str, str], Record],
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        kernel: str,
    ) -> Heads:
        """The output of a call that feeds some of the tokens."""
        if site.name not in run.tokens:
            raise AccelError(
                f"{site.name} is called with some of the tokens before a call with all of them"
                " filled its cache"
            )
        held = run.tokens[site.name]
        record = records.setdefault((site.name, CACHED_LABEL), Record())
        watch = Stopwatch(record, q.device)
        out = held.attend(step, q, k, v, partial(self._attention, site, run))
        watch.stop()
        record.calls += 1
        record.keep += held.keep
        own = self._plan.dense == "kernel" or held.outside is not None
        record.kernels.add(kernel if own else "dense")
        return out

    def _beside(
        self,
        site: Site,
        run: Run,
        step: TextStep,
        records: dict[tuple[str, str], Record],
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        valid: Bool[Tensor, "batch kv_tokens"] | None,
        dense: Callable[[], Heads],
        kernel: str,
    ) -> Heads:
        """The output of a call whose keys begin with those that the model keeps itself."""
        own = q.shape[2]
        places = torch.arange(k.shape[2] - own, k.shape[2], device=k.device)[None]
        live = (k.shape[2] - own, k.shape[2])
        step = replace(step, live=live, fed=places, valid=valid)
        if step.beside == "thinned":
            fresh = k[:, :, -own:], v[:, :, -own:]
            return self._fed(site, run, step, records, q, *fresh, kernel)
        record = records.setdefault((site.name, DENSE_LABEL), Record())
        watch = Stopwatch(record, q.device)
        out = dense()
        watch.stop()
        record.calls += 1
        record.keep += 1.0
        record.kernels.add("dense")
        if step.fills:
            self.fill(site, run, step, q, k, v)
        return out

    def fill(
        self, site: Site, run: Run, step: TextStep, q: Heads, k: KeyHeads, v: KeyHeads
    ) -> None:
        """Keep of a whole call what the calls after it will see."""
        cache = self._plan.cache
        if cache is None:
            raise AccelError("a pipeline fills a cache that the plan does not have")
        attend = partial(self._attention, site, run)
        run.tokens[site.name] = SiteTokens.filled(cache, step, q, k, v, attend)
        held = sum(tokens.n_bytes for tokens in run.tokens.values())
        run.token_bytes = max(run.token_bytes, held)

    def _attention(
        self,
        site: Site,
        run: Run,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        lengths: Int[Tensor, " batch"] | None,
        *,
        valid: Bool[Tensor, "batch kv_tokens"] | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if valid is not None or (self._plan.dense == "host" and not return_lse):
            return host_attention(q, k, v, lengths, valid=valid)
        return sparse_attention(
            q,
            k,
            v,
            full_mask(run, self._plan.block, q, k),
            kv_length=lengths,
            precision=self._plan.precision_of(site.name),
            return_lse=return_lse,
        )
