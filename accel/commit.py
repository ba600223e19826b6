"""One step of a masked diffusion sampler: candidates, their confidence, and which are committed.

The rules of LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618), SDAR
and EB-Sampler (arXiv 2505.24857), for any batch: every sample commits by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.decoding import Decoding
from accel.errors import AccelError

__all__ = ["Generators", "Sampling", "candidates", "committed", "even_split", "uniform"]

Generators = torch.Generator | Sequence[torch.Generator | None] | None
Logits = Float[Tensor, "batch tokens vocabulary"]
Tokens = Int[Tensor, "batch tokens"]
LATE = -1e30  # the confidence of what is committed last


@dataclass(frozen=True, slots=True)
class Sampling:
    """How candidates are drawn; the user's, not the plan's.

    temperature: 0 takes the likeliest token. top_k, top_p: of the likeliest so many, or those whose
        probabilities reach so much together; None: of all.
    never: token ids that are no candidates (LLaDA's logits_eos_inf); last: ids that are committed
        only when nothing else is left (confidence_eos_eot_inf).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    never: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise AccelError(f"temperature is a number of at least 0, got {self.temperature!r}")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise AccelError(f"top_k is a number of tokens, at least 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AccelError(f"top_p is a share in (0, 1], got {self.top_p!r}")


def even_split(tokens: int, steps: int) -> list[int]:
    """`tokens` in `steps` shares that differ by one at most, the larger ones first.

    >>> even_split(7, 3)
    [3, 2, 2]
    """
    base, more = divmod(tokens, steps)
    return [base + (step < more) for step in range(steps)]


def uniform(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float64, [batch, ...]; of a list of generators one per sample,
    and a half for samples that have none.

    Drawn where the generator is, so that the device does not change them.
    """
    if not isinstance(generator, Sequence):
        place = device if generator is None else generator.device
        made = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=place)
        return made.to(device)
    made = torch.full(tuple(shape), 0.5, dtype=torch.float64, device=device)
    for row, g in zip(made, generator, strict=True):
        if g is not None:
            row.copy_(torch.rand(row.shape, generator=g, dtype=torch.float64, device=g.device))
    return made


def candidates(
    logits: Logits, sampling: Sampling, generator: Generators = None
) -> tuple[Tokens, Float[Tensor, "batch tokens vocabulary"]]:
    """The candidate of every token, and the probabilities that the model gives all of them.

    With a temperature T the candidate is argmax(l - T ln(-ln u)), u uniform: a draw from
    softmax(l / T), in float64, since low precision makes Gumbel noise worse than none (LLaDA).
    Probabilities are those without temperature, of what `never` leaves.
    """
    logits = logits.float()
    if sampling.never:
        logits = logits.clone()
        logits[..., list(sampling.never)] = -inf
    shares = logits.softmax(-1)
    if sampling.temperature == 0:
        return logits.argmax(-1), shares
    able = _likeliest(logits, sampling).double()
    noise = uniform(able.shape, generator, able.device)
    tiny = torch.finfo(torch.float64).tiny
    gumbel = -torch.log(-torch.log(noise.clamp(min=tiny)))
    return (able + sampling.temperature * gumbel).argmax(-1), shares


def _likeliest(logits: Logits, sampling: Sampling) -> Logits:
    """Logits with those that top_k and top_p leave out at -inf."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, place = (logits / sampling.temperature).sort(-1, descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # never the first
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, place, beyond), -inf)
    return logits


def confidences(
    kind: str,
    tokens: Tokens,
    shares: Float[Tensor, "batch tokens vocabulary"],
    generator: Generators = None,
) -> Float[Tensor, "batch tokens"]:
    """How sure the model is of each candidate (see `Decoding.confidence`)."""
    if kind == "probability":
        return shares.gather(-1, tokens[..., None])[..., 0]
    if kind == "margin":
        best = shares.topk(2, -1).values
        return best[..., 0] - best[..., 1]
    if kind == "entropy":
        return torch.special.entr(shares).sum(-1).neg()
    return uniform(tokens.shape, generator, tokens.device).float()


def committed(
    decoding: Decoding,
    tokens: Tokens,
    shares: Float[Tensor, "batch tokens vocabulary"],
    open_: Bool[Tensor, "batch tokens"],
    quota: Int[Tensor, " batch"],
    *,
    last: Sequence[int] = (),
    generator: Generators = None,
) -> Bool[Tensor, "batch tokens"]:
    """Which candidates are committed: of those that are open, at least the best of every sample.

    open_: tokens that are still masked and may be committed; quota: how many the even split asks
    for; last: ids whose confidence counts as the lowest.
    """
    sure = confidences(decoding.confidence, tokens, shares, generator)
    if last:
        late = torch.isin(tokens, torch.tensor(list(last), device=tokens.device))
        sure = sure.masked_fill(late, LATE)
    sure = sure.masked_fill(~open_, -inf)
    ranked, place = sure.sort(dim=-1, descending=True, stable=True)
    number = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    count = open_.sum(1)
    bound = decoding.bound or 0.0
    if decoding.rule == "quota":
        wanted = quota
    elif decoding.rule == "threshold":
        wanted = (ranked >= bound).sum(1)
    elif decoding.rule == "threshold_or_quota":
        wanted = torch.maximum((ranked > bound).sum(1), quota)
    elif decoding.rule == "factor":
        fits = (number + 1) * (1 - ranked) < bound
        wanted = torch.where(fits, number, 0).amax(1)
    else:
        entropy = ranked.neg().masked_fill(ranked <= LATE, inf)
        fits = entropy.cumsum(1) - entropy.cummax(1).values <= bound
        wanted = fits.long().cumprod(1).sum(1)
    wanted = torch.minimum(wanted.clamp(min=1), count)
    return torch.zeros_like(open_).scatter(1, place, number <= wanted[:, None])
