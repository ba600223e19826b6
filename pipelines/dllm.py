"""A pipeline for masked diffusion language models of LLaDA's kind: any model, any batch, any rule.

`accel.enable(pipe, plan)` makes it faster; a plan's cache and decoding are followed where the call
does not say otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from accel.commit import Generators, Sampling, candidates, committed, even_split
from accel.context import Where, standing
from accel.decoding import Decoding
from accel.errors import AccelError
from accel.pipelines.enable import plan_of
from accel.pipelines.text_host import TextHost
from accel.pipelines.token_feed import TokenFeed
from accel.text_step import text_step

__all__ = ["MaskedDiffusionOutput", "MaskedDiffusionPipeline"]

_Pipeline: Any = DiffusionPipeline  # which has no types
EOS_WORDS = ("allow", "last", "never")
Tokens = Int[Tensor, "batch tokens"]


@dataclass
class MaskedDiffusionOutput(BaseOutput):
    """sequences: what was generated, [batch, gen_length]; texts: the same decoded up to the first
    end-of-text token, None for output_type "ids"; calls: how often the model was called.
    """

    sequences: Tensor
    texts: list[str] | None
    calls: int


class MaskedDiffusionPipeline(_Pipeline):
    """Text by masked diffusion: [prompt, MASK x gen_length], filled block by block.

    LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487; `shift_logits=True`) and their kin: a model
    that maps token ids to logits at every place and sees all of them. A transformers class whose
    configuration says `is_causal=False`, one that is bidirectional by itself, or remote code.

        >>> pipe = MaskedDiffusionPipeline.from_pretrained("samples/models/llada-tiny")
        >>> pipe("def main():", gen_length=64).texts[0]        # doctest: +SKIP

    model, tokenizer: as transformers loads them. shift_logits: the logits of a token stand at the
    token before it. mask_token_id: None takes the tokenizer's, then the configuration's.
    """

    _callback_tensor_inputs = ("tokens", "committed")
    _optional_components = ("tokenizer",)

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        shift_logits: bool = False,
        mask_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, tokenizer=tokenizer)
        self.register_to_config(shift_logits=shift_logits, mask_token_id=mask_token_id)
        self._host: TextHost | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        messages: Sequence[Any] | None = None,
        input_ids: Int[Tensor, "*batch tokens"] | None = None,
        attention_mask: Shaped[Tensor, "*batch tokens"] | None = None,
        *,
        gen_length: int = 128,
        block_length: int | None = None,
        num_inference_steps: int | None = None,
        confidence: str | None = None,
        rule: str | None = None,
        bound: float | None = None,
        stop_at_eos: bool | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 0.0,
        eos: str = "allow",
        use_chat_template: bool = True,
        generator: Generators = None,
        output_type: str = "text",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        streamer: Any = None,
        return_dict: bool = True,
    ) -> MaskedDiffusionOutput | tuple[Tensor, list[str] | None]:
        """Fill `gen_length` masked tokens after each prompt.

        prompt: one text or several, put into the tokenizer's chat template where it has one and
            `use_chat_template`; messages: one conversation or several instead; input_ids,
            attention_mask: token ids [batch, tokens] instead, with 0 for padding, on the left.
            Prompts may differ in length, and be empty.
        block_length, confidence, rule, bound, stop_at_eos: see `accel.decoding.Decoding`; None is
            as the enabled plan has it, else that class's default. A block length that does not
            divide gen_length makes a shorter last block; gen_length or more makes one block.
        num_inference_steps: of the whole generation, at least one a block, dealt to blocks by their
            lengths; None: by the tokens that a step commits.
        temperature, top_k, top_p: see `Sampling`. guidance_scale: w of classifier-free guidance
            with a masked prompt, l_u + (w + 1)(l - l_u); 0 for none.
        eos: `never` lets no end-of-text token be a candidate, `last` commits it only when nothing
            else is left.
        generator: for candidates that are drawn; a list has one for each sample, which then gets
            what it gets alone.
        callback_on_step_end: called (pipe, step, block, tensors) after each step, may give back
            {"tokens": ...}; the tensors are those of callback_on_step_end_tensor_inputs.
        streamer: `put` the ids of each finished block, then `end` (transformers' streamers).
        """
        plan = plan_of(self.model)
        base = (plan.decoding if plan is not None else None) or Decoding()
        decoding = _with(
            base,
            block_length=block_length,
            confidence=confidence,
            rule=rule,
            bound=bound,
            stop_at_eos=stop_at_eos,
        )
        if output_type not in ("text", "ids"):
            raise AccelError(f"output_type is 'text' or 'ids', got {output_type!r}")
        ids, real = self._prompts(prompt, messages, input_ids, attention_mask, use_chat_template)
        batch, prompt_length = ids.shape
        self._check(gen_length, prompt_length, temperature, top_k, top_p, guidance_scale, eos)
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise AccelError(f"{len(generator)} generators for {batch} prompts; give one for each")
        mask_id, ends = self.mask_id, self._ends()
        if (eos != "allow" or stop_at_eos) and not ends:
            raise AccelError(
                "neither the tokenizer nor the model's configuration names an end-of-text token,"
                " which eos and stop_at_eos need"
            )
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            never=ends if eos == "never" else (),
            last=ends if eos == "last" else (),
        )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise AccelError(
                f"callback_on_step_end_tensor_inputs knows {list(self._callback_tensor_inputs)},"
                f" got {sorted(unknown)}"
            )
        blocks = _blocks(prompt_length, gen_length, decoding.block_length)
        steps = _steps([stop - start for start, stop in blocks], decoding, num_inference_steps)
        run = _Generation(
            self, plan, decoding, sampling, ids, real, gen_length, blocks, steps, mask_id, ends
        )
        with self.progress_bar(total=gen_length) as bar:
            for step, block, done in run.go(guidance_scale, generator):
                bar.update(done)
                if callback_on_step_end is not None:
                    known = {"tokens": run.tokens, "committed": run.committed}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    found = callback_on_step_end(self, step, block, given) or {}
                    run.tokens = found.get("tokens", run.tokens)
                if streamer is not None:
                    run.stream(streamer)
        if streamer is not None:
            run.stream(streamer)
            streamer.end()
        sequences = run.tokens[:, prompt_length:]
        texts = self._texts(sequences, ends) if output_type == "text" else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return sequences, texts
        return MaskedDiffusionOutput(sequences, texts, run.calls)

    @property
    def host(self) -> TextHost:
        """The model, as this pipeline calls it."""
        if self._host is None or self._host.model is not self.model:
            self._host = TextHost(self.model)
        return self._host

    def _prompts(
        self,
        prompt: str | Sequence[str] | None,
        messages: Sequence[Any] | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        use_chat_template: bool,
    ) -> tuple[Tokens, Bool[Tensor, "batch tokens"] | None]:
        """Token ids with padding on the left, and which are real; None where all are."""
        given = [x is not None for x in (prompt, messages, input_ids)]
        if sum(given) != 1:
            raise AccelError("give one of prompt, messages and input_ids")
        device = self._execution_device
        if input_ids is not None:
            return _left_padded(input_ids.to(device), attention_mask)
        if attention_mask is not None:
            raise AccelError("attention_mask belongs to input_ids; texts are padded here")
        if self.tokenizer is None:
            raise AccelError("this pipeline has no tokenizer; give input_ids")
        rows = self.prompt_ids(prompt, messages, use_chat_template)
        longest = max(map(len, rows), default=0)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (to, on) in zip(rows, zip(ids, real, strict=True), strict=True):
            to[longest - len(row) :] = torch.tensor(row, dtype=torch.long)
            on[longest - len(row) :] = True
        return _left_padded(ids.to(device), real)

    def prompt_ids(
        self,
        prompt: str | Sequence[str] | None = None,
        messages: Any = None,
        use_chat_template: bool = True,
    ) -> list[list[int]]:
        """Token ids of every prompt, as a call has them before what it generates."""
        if messages is not None:
            if not isinstance(messages, Sequence) or not messages:
                raise AccelError(f"messages is a conversation, or a list of them, got {messages!r}")
            several = bool(messages) and not isinstance(messages[0], Mapping)
            talks = list(messages) if several else [messages]
        else:
            texts = [prompt] if isinstance(prompt, str) else prompt
            listed = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
            if not listed or not texts:
                raise AccelError(f"prompt is a text, or a list of texts, got {prompt!r:.80}")
            if not (use_chat_template and getattr(self.tokenizer, "chat_template", None)):
                return [self.tokenizer(text).input_ids for text in texts]
            talks = [[{"role": "user", "content": text}] for text in texts]
        return [
            self.tokenizer.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for talk in talks
        ]

    def _check(
        self,
        gen_length: int,
        prompt_length: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance_scale: float,
        eos: str,
    ) -> None:
        if type(gen_length) is not int or gen_length < 1:
            raise AccelError(f"gen_length is a number of tokens, at least 1, got {gen_length!r}")
        longest = self.host.longest
        if longest is not None and prompt_length + gen_length > longest:
            raise AccelError(
                f"{prompt_length} tokens of prompt and gen_length {gen_length} are more than the"
                f" {longest} that the model was made for; shorten either"
            )
        if not temperature >= 0:
            raise AccelError(f"temperature is a number of at least 0, got {temperature!r}")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise AccelError(f"top_k is a number of tokens, at least 1, got {top_k!r}")
        if top_p is not None and not 0 < top_p <= 1:
            raise AccelError(f"top_p is a share in (0, 1], got {top_p!r}")
        if not guidance_scale >= 0:
            raise AccelError(f"guidance_scale is a number of at least 0, got {guidance_scale!r}")
        if eos not in EOS_WORDS:
            raise AccelError(f"eos is one of {', '.join(EOS_WORDS)}, got {eos!r}")

    @property
    def mask_id(self) -> int:
        """The token that stands where none was committed yet."""
        configured = getattr(self.host.config, "mask_token_id", None)
        for found in (self.config.mask_token_id, getattr(self.tokenizer, "mask_token_id", None)):
            if found is not None:
                return found
        if configured is None:
            raise AccelError(
                "neither the tokenizer nor the model's configuration names a mask token; say it by"
                " MaskedDiffusionPipeline(model, tokenizer, mask_token_id=...)"
            )
        return configured

    def _ends(self) -> tuple[int, ...]:
        """Ids of end-of-text tokens: the tokenizer's, else the configuration's; none where no one
        says.
        """
        for known in (self.tokenizer, self.host.config):
            found = getattr(known, "eos_token_id", None)
            if found is not None:
                return tuple(found) if isinstance(found, list | tuple) else (found,)
        return ()

    def _texts(self, sequences: Tokens, ends: tuple[int, ...]) -> list[str] | None:
        if self.tokenizer is None:
            return None
        rows = []
        for row in sequences.tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            rows.append(row[:end])
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


class _Generation:
    """The loop: calls the model block by block until nothing is masked."""

    def __init__(
        self,
        pipe: MaskedDiffusionPipeline,
        plan: Any,
        decoding: Decoding,
        sampling: Sampling,
        ids: Tokens,
        real: Bool[Tensor, "batch tokens"] | None,
        gen_length: int,
        blocks: list[tuple[int, int]],
        steps: list[int],
        mask_id: int,
        ends: tuple[int, ...],
    ) -> None:
        self._host, self._plan = pipe.host, plan
        self._decoding, self._sampling = decoding, sampling
        self._blocks, self._steps = blocks, steps
        self._mask_id, self._ends = mask_id, ends
        self._prompt = ids.shape[1]
        self._shift = pipe.config.shift_logits
        fresh = ids.new_full((ids.shape[0], gen_length), mask_id)
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
                    index, turn == 0, torch.cat([undecided, undecided]) if twice else undecided
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


def _with(base: Decoding, **given: Any) -> Decoding:
    """`base` with what a call says; another rule does not take over the bound."""
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("rule", base.rule) != base.rule and "bound" not in said:
        said["bound"] = None
    return replace(base, **said)


def _blocks(prompt: int, length: int, block: int | None) -> list[tuple[int, int]]:
    size = min(block or length, length)
    starts = range(prompt, prompt + length, size)
    return [(start, min(start + size, prompt + length)) for start in starts]


def _steps(lengths: list[int], decoding: Decoding, total: int | None) -> list[int]:
    """Steps of every block: at least one, at most one a token."""
    if total is None:
        return [-(-n // decoding.tokens_per_step) for n in lengths]
    if type(total) is not int or total < 1:
        raise AccelError(f"num_inference_steps is a whole number of at least 1, got {total!r}")
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    marks = [round(total * end / ends[-1]) for end in ends]
    asked = [b - a for a, b in zip([0, *marks], marks, strict=False)]
    return [max(1, min(n, steps)) for n, steps in zip(lengths, asked, strict=True)]


def _left_padded(
    ids: Tensor, mask: Tensor | None
) -> tuple[Tokens, Bool[Tensor, "batch tokens"] | None]:
    """The ids with what is real at the right end, cut to the longest."""
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise AccelError(
            f"input_ids are whole numbers [batch, tokens], got {ids.dtype} {tuple(ids.shape)}"
        )
    if len(ids) == 0:
        raise AccelError("there is no prompt")
    if mask is None:
        return ids.long(), None
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise AccelError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(ids.shape)}")
    real = mask.to(ids.device) != 0
    if bool(real.all()):
        return ids.long(), None
    place = torch.sort(real.long(), dim=1, stable=True).indices
    longest = int(real.sum(1).max())
    ids, real = (x.gather(1, place)[:, x.shape[1] - longest :] for x in (ids, real))
    return ids.long(), None if bool(real.all()) else real


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
