"""The loop of a masked diffusion language model: block by block, until nothing is masked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.commit import Generators, Sampling, candidates, committed, even_split
from accel.context import Where, standing
from accel.decoding import Decoding
from accel.errors import AccelError
from accel.pipelines.text_host import TextHost
from accel.pipelines.token_feed import TokenFeed
from accel.plan import Plan
from accel.text_step import text_step

__all__ = ["Asked", "Generation", "blocks_of", "steps_of"]

Tokens = Int[Tensor, "batch tokens"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks for. steps: of the whole generation, None for as many as the decoding says;
    ends: ids of end-of-text tokens; shift: the logits of a token stand at the one before it.
    """

    gen_length: int
    decoding: Decoding
    sampling: Sampling
    steps: int | None
    mask_id: int
    ends: tuple[int, ...]
    shift: bool


class Generation:
    """The loop: calls the model block by block until nothing is masked."""

    def __init__(
        self,
        host: TextHost,
        plan: Plan | None,
        asked: Asked,
        ids: Tokens,
        real: Bool[Tensor, "batch tokens"] | None,
    ) -> None:
        self._host, self._plan, self._asked = host, plan, asked
        self._prompt = ids.shape[1]
        self._mask_id, self._ends, self._shift = asked.mask_id, asked.ends, asked.shift
        self._decoding, self._sampling = asked.decoding, asked.sampling
        self._blocks = blocks_of(self._prompt, asked.gen_length, asked.decoding.block_length)
        lengths = [stop - start for start, stop in self._blocks]
        self._steps = steps_of(lengths, asked.decoding, asked.steps)
        fresh = ids.new_full((ids.shape[0], asked.gen_length), self._mask_id)
        self.tokens = torch.cat([ids, fresh], 1)
        self.committed = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.calls = 0
        self._over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._real: Tensor | None = None
        self._positions: Tensor | None = None
        if real is not None:
            more = torch.ones_like(fresh, dtype=torch.bool)
            self._real = torch.cat([real, more], 1)
            self._positions = (self._real.cumsum(1) - 1).clamp(min=0)
        self._told, self._finished = 0, 0

    def go(self, guidance: float, generator: Generators) -> Iterator[tuple[int, int, int]]:
        """Every step: its number, its block's, and how many tokens it committed in the mean."""
        self._host.check(self._real is not None)
        cache = None if self._plan is None else self._plan.cache
        lone = self._real is not None and not bool(self._real[:, : self._prompt].any(1).all())
        if lone and self._shift and cache is not None:
            raise AccelError(
                "with shifted logits and a cache an empty prompt has to be alone in its batch"
            )
        twice = guidance > 0
        real = self._real
        feed = TokenFeed(
            cache,
            prompt=self._prompt,
            blocks=self._blocks,
            real=torch.cat([real, real]) if twice and real is not None else real,
            shift=self._shift,
            steps=self._steps,
            device=self.tokens.device,
        )
        run, number, total = object(), 0, sum(self._steps)
        before = self.tokens[:, self._prompt :] == self._mask_id
        for index, ((start, stop), steps) in enumerate(zip(self._blocks, self._steps, strict=True)):
            quotas = self._quotas(start, stop, steps)
            turn = 0
            while True:
                open_ = (self.tokens[:, start:stop] == self._mask_id) & ~self._over[:, None]
                if not bool(open_.any()):
                    break
                now = self.tokens[:, self._prompt :] == self._mask_id
                undecided = before | now  # a callback may mask what was decided
                fed = feed.next(
                    index, turn, torch.cat([undecided, undecided]) if twice else undecided
                )
                before = now
                done_steps, step_of_block = sum(self._steps[:index]), min(turn, steps - 1)
                place = (index, step_of_block, steps)
                where = Where(done_steps + step_of_block, total, run=run, block=place)
                with standing(where), text_step(fed.step):
                    logits = self._logits(fed, start, stop, guidance)
                self.calls += 1
                done = self._commit(
                    logits, start, stop, open_, quotas[:, min(turn, steps - 1)], generator
                )
                turn += 1
                yield number, index, done
                number += 1
            self._finished = index + 1
            if self._decoding.stop_at_eos and self._ends:
                self._stop(start, stop)
                self._fill()
                if bool(self._over.all()):
                    break
        self._fill()

    def stream(self, streamer: Any) -> None:
        """Put the blocks that were finished since the last time."""
        for start, stop in self._blocks[self._told : self._finished]:
            streamer.put(self.tokens[:, start:stop].cpu())
        self._told = self._finished

    def _quotas(self, start: int, stop: int, steps: int) -> Int[Tensor, "batch steps"]:
        counts = (self.tokens[:, start:stop] == self._mask_id).sum(1).tolist()
        return torch.tensor([even_split(n, steps) for n in counts], device=self.tokens.device)

    def _logits(
        self, fed: Any, start: int, stop: int, guidance: float
    ) -> Float[Tensor, "batch block vocabulary"]:
        tokens = self.tokens
        if guidance > 0:
            blank = tokens.clone()
            hidden = blank[:, : self._prompt]
            hidden[:] = self._mask_id
            tokens = torch.cat([tokens, blank])
        slots = fed.slots.expand(len(tokens), -1)
        positions = self._positions
        if positions is None and (fed.step.fed is not None or slots.shape[1] < tokens.shape[1]):
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if positions is not None:
            if positions.shape[0] > 1 and guidance > 0:
                positions = torch.cat([positions, positions])
            positions = positions.expand(len(tokens), -1).gather(1, slots)
        real = fed.step.valid if fed.step.fed is None else None
        logits = self._host.logits(tokens.gather(1, slots), positions, real, fed.rows)
        begin = fed.step.block[0]
        if fed.rows is None:
            logits = _looked_up(logits, slots, begin, stop)
        if self._shift:
            logits = self._shifted(logits, start, begin)
        if guidance > 0:
            with_prompt, without = logits.chunk(2)
            logits = without + (guidance + 1) * (with_prompt - without)
        return logits

    def _shifted(
        self, logits: Float[Tensor, "batch some vocabulary"], start: int, begin: int
    ) -> Float[Tensor, "batch block vocabulary"]:
        """Logits of the tokens from `start`, which stand one before them; those of a sample's very
        first token stand at itself.
        """
        own = logits[:, start - begin : start - begin + 1]
        if begin == start:
            return torch.cat([own, logits[:, :-1]], 1)
        if self._real is None or start > self._prompt:
            return logits[:, :-1]
        alone = ~self._real[:, begin].repeat(len(logits) // len(self._real))
        return torch.cat(
            [torch.where(alone[:, None, None], own, logits[:, :1]), logits[:, 1:-1]], 1
        )

    def _commit(
        self,
        logits: Float[Tensor, "batch block vocabulary"],
        start: int,
        stop: int,
        open_: Bool[Tensor, "batch block"],
        quota: Int[Tensor, " batch"],
        generator: Generators,
    ) -> int:
        logits = logits.clone() if self._mask_id < logits.shape[-1] else logits
        if self._mask_id < logits.shape[-1]:
            logits[..., self._mask_id] = -torch.inf  # a mask is no token to commit
        if isinstance(generator, Sequence):
            # a sample that waits for others draws nothing, as it would alone
            going = open_.any(1).tolist()
            generator = [g if on else None for g, on in zip(generator, going, strict=True)]
        found, shares = candidates(logits, self._sampling, generator)
        chosen = committed(
            self._decoding,
            found,
            shares,
            open_,
            quota,
            last=self._sampling.last,
            generator=generator,
        )
        tokens = self.tokens.clone()
        tokens[:, start:stop] = torch.where(chosen, found, tokens[:, start:stop])
        self.tokens = tokens
        self.committed = torch.zeros_like(self.committed)
        self.committed[:, start:stop] = chosen
        return int(chosen.sum()) // len(chosen)

    def _stop(self, start: int, stop: int) -> None:
        ends = torch.tensor(self._ends, device=self.tokens.device)
        self._over |= torch.isin(self.tokens[:, start:stop], ends).any(1)

    def _fill(self) -> None:
        """What was not gone on with ends."""
        if self._ends:
            left = (self.tokens == self._mask_id) & self._over[:, None]
            left[:, : self._prompt] = False
            self.tokens = self.tokens.masked_fill(left, self._ends[0])


def blocks_of(prompt: int, length: int, block: int | None) -> list[tuple[int, int]]:
    size = min(block or length, length)
    starts = range(prompt, prompt + length, size)
    return [(start, min(start + size, prompt + length)) for start in starts]


def steps_of(lengths: list[int], decoding: Decoding, total: int | None) -> list[int]:
    """Steps of every block: at least one, at most one a token."""
    if total is None:
        return [-(-n // decoding.tokens_per_step) for n in lengths]
    if type(total) is not int or total < 1:
        raise AccelError(f"num_inference_steps is a whole number of at least 1, got {total!r}")
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    marks = [round(total * end / ends[-1]) for end in ends]
    asked = [b - a for a, b in zip([0, *marks], marks, strict=False)]
    return [max(1, min(n, steps)) for n, steps in zip(lengths, asked, strict=True)]


def _looked_up(
    logits: Float[Tensor, "batch fed vocabulary"],
    slots: Int[Tensor, "batch fed"],
    start: int,
    stop: int,
) -> Float[Tensor, "batch block vocabulary"]:
    """Logits of the slots of a block; of those that were not fed, zeros."""
    inside = (slots >= start) & (slots < stop)
    place = torch.where(inside, slots - start, stop - start)
    made = logits.new_zeros(len(logits), stop - start + 1, logits.shape[2])
    made.scatter_(1, place[..., None].expand_as(logits), logits)
    return made[:, : stop - start]
