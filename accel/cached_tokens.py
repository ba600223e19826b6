"""Keys and values of one site between whole calls of a text model, and attention to them.

By slots of its own, first the tokens that may be fed again, then those that were chosen of the
others; padding is left out, so that samples have different lengths and nothing is masked inside.
Rotary positions are in the keys already: they travel with the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.kernels.merge import merge
from accel.text_step import TextStep
from accel.token_cache import TokenCache

__all__ = ["SiteTokens", "choose_tokens", "host_attention"]

Heads = Float[Tensor, "batch heads tokens dim"]
KeyHeads = Float[Tensor, "batch kv_heads kv_tokens dim"]
# (q, k, v, lengths of the keys by sample or None) -> output; with return_lse also log-sum-exp
Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]


def choose_tokens(
    cache: TokenCache, step: TextStep, q: Heads, k: KeyHeads
) -> tuple[Int[Tensor, "batch ranked chosen"], Int[Tensor, " batch"] | None]:
    """Places of the tokens outside `step.live` that a cache holds, ascending, and how many of each
    sample's are meant (the first so many; None: all).

    Of n such tokens of a sample `ceil(keep * n)` are held, at least one: those with the largest
    maximum of q̄·k over `pool` neighbours, where q̄ is the mean of the block's queries over tokens
    and over the query heads of each key head; the mean of that over key heads, unless `by_head`
    (Sparse-dLLM, arXiv 2508.02558, which neither scales nor takes a softmax).
    """
    batch, heads, tokens, dim = k.shape
    outside = torch.ones(tokens, dtype=torch.bool, device=k.device)
    outside[step.live[0] : step.live[1]] = False
    able = outside.expand(batch, tokens) if step.valid is None else outside & step.valid
    counts = able.sum(1)
    if cache.keep < 1:
        mean = q[:, :, slice(*step.block)].float().mean(2)
        mean = mean.view(batch, heads, -1, dim).mean(2)
        score = torch.einsum("bhd,bhnd->bhn", mean, k.float())
        if not cache.by_head:
            score = score.mean(1, keepdim=True)
        score = score.masked_fill(~able[:, None], -inf)
        if cache.pool > 1:
            score = F.max_pool1d(score, cache.pool, 1, cache.pool // 2)
            score = score.masked_fill(~able[:, None], -inf)
        # as floating point has it, a hair under the next whole number
        wanted = (counts.double() * cache.keep - 1e-9).ceil().long().clamp(min=1)
        counts = torch.minimum(wanted, counts)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        held = rank < counts[:, None, None]
    else:
        held = able[:, None]
    most = int(counts.max())
    places = torch.sort(~held, dim=-1, stable=True).indices[..., :most]
    same = bool((counts == most).all())
    return places, None if same else counts


@dataclass(slots=True)
class SiteTokens:
    """k, v: [batch, kv heads, live + chosen, dim]; lengths: of them, by sample, None where all are
    meant. first: the place of the first live token.

    outside: output and log-sum-exp of the block's queries over the chosen tokens alone, where those
    are frozen; then k and v are empty.
    """

    k: KeyHeads
    v: KeyHeads
    lengths: Int[Tensor, " batch"] | None
    first: int
    tokens: int
    outside: tuple[Tensor, Tensor] | None = None

    @classmethod
    def filled(
        cls,
        cache: TokenCache,
        step: TextStep,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        attend: Attention,
    ) -> "SiteTokens":
        """From a whole call."""
        whole = k.shape[2]
        places, counts = choose_tokens(cache, step, q, k)
        chosen = [_taken(x, places) for x in (k, v)]
        if cache.external == "frozen":
            block = q[:, :, slice(*step.block)]
            out, lse = torch.zeros_like(block), torch.full(block.shape[:3], -inf, device=q.device)
            if places.shape[2]:
                out, lse = attend(block, *chosen, counts, return_lse=True)
            empty = k[:, :, :0].clone()
            return cls(empty, empty, None, step.live[0], whole, (out, lse))
        live = slice(*step.live)
        k, v = (torch.cat([x[:, :, live], kept], 2) for x, kept in zip((k, v), chosen, strict=True))
        lengths = None if counts is None else counts + step.live[1] - step.live[0]
        return cls(k, v, lengths, step.live[0], whole)

    @property
    def keep(self) -> float:
        """Share of the tokens of a whole call that are held."""
        return self.k.shape[2] / self.tokens

    @property
    def n_bytes(self) -> int:
        held = [self.k, self.v, *(self.outside or ())]
        return sum(x.numel() * x.element_size() for x in held)

    def attend(
        self, step: TextStep, q: Heads, k: KeyHeads, v: KeyHeads, attend: Attention
    ) -> Heads:
        """The output of a call that feeds `step.fed`; its keys and values are kept."""
        assert step.fed is not None
        if self.outside is not None:
            out, lse = attend(q, k, v, None, return_lse=True)
            return merge([(out, lse), self.outside])[0]
        self._write(step.fed - self.first, step.live[1] - self.first, k, v)
        out = attend(q, self.k, self.v, self.lengths, valid=step.keys)
        assert isinstance(out, Tensor)
        return out

    def _write(self, at: Int[Tensor, "rows fed"], live: int, k: KeyHeads, v: KeyHeads) -> None:
        more = live - self.k.shape[2]
        if more > 0:  # a sequence that grows; nothing is held beside it
            self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
            self.tokens = live + self.first
        if at.shape[0] == 1:
            self.k.index_copy_(2, at[0], k)
            self.v.index_copy_(2, at[0], v)
            return
        at = at[:, None, :, None].expand_as(k)
        self.k.scatter_(2, at, k)
        self.v.scatter_(2, at, v)


def _taken(
    x: KeyHeads, places: Int[Tensor, "batch ranked chosen"]
) -> Float[Tensor, "batch kv_heads chosen dim"]:
    index = places[..., None].expand(x.shape[0], x.shape[1], places.shape[2], x.shape[3])
    return x.gather(2, index)


def host_attention(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    lengths: Int[Tensor, " batch"] | None,
    *,
    valid: Bool[Tensor, "batch kv_tokens"] | None = None,
) -> Tensor:
    """torch's attention over the first `lengths` keys of every sample, and the `valid` ones."""
    mask = valid
    if lengths is not None:
        first = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
        mask = first if mask is None else first & mask
    if mask is not None:
        mask = mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
