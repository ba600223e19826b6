"""Training of llada-tiny: masked tokens of source text, and masked answers to retrieval tasks whose
prompts grow from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from llada_tiny_model import CHAT_TOKENS, SPECIAL, count_with, encode_chat
from retrieval_tasks import KINDS, Shape, Source, make_task
from torch import Tensor
from training import Average, Muon
from transformers import EuroBertForMaskedLM, PreTrainedTokenizerFast

__all__ = ["PHASES", "Batch", "Lengths", "LladaSettings", "Phase", "Rows", "llada_step"]

BLOCK = 32  # of semi-autoregressive decoding
LABELS = (*KINDS, "text", "echo")
SEEN = 4  # tokens before one of an answer, by which it is found: a line
HOLE = 4  # tokens of a hole at most, so that none is told by those after it


@dataclass(frozen=True, slots=True)
class Lengths:
    """Rows of one step: `batch` of `prompt + answer` tokens each, whose positions reach to `reach`
    by gaps in the prompts of half the rows.

    shares: among the rows, of needle, copy, recall, plain text, and echo: random tokens that come
    again and again, from which matching is learned soonest.
    """

    prompt: int
    answer: int
    batch: int
    reach: int = 4352
    shares: tuple[float, float, float, float, float] = (0.2, 0.25, 0.4, 0.15, 0.0)
    pairs: tuple[int, int] = (16, 128)

    @property
    def shape(self) -> Shape:
        return Shape(self.prompt, self.answer, CHAT_TOKENS, pairs=self.pairs)


@dataclass(frozen=True, slots=True)
class Phase:
    """Up to `until` (fraction of the stage) train on `lengths`, step by step in turn."""

    until: float
    lengths: tuple[Lengths, ...]


# retrieval is learned among few tokens, many of which are answers, and carried to longer prompts;
# without short ones beside them it is forgotten on the way
ECHO = Lengths(prompt=96, answer=64, batch=24, reach=0, shares=(0.0, 0.15, 0.3, 0.05, 0.5))
TINY = Lengths(prompt=96, answer=64, batch=24, reach=0, shares=(0.05, 0.25, 0.5, 0.1, 0.1))
SHORT = Lengths(prompt=160, answer=96, batch=16)
K_HALF = Lengths(prompt=320, answer=192, batch=8)
K_ONE = Lengths(prompt=768, answer=256, batch=4)
K_TWO = Lengths(prompt=1792, answer=256, batch=3)
WHOLE = Lengths(prompt=4096, answer=256, batch=2, shares=(0.1, 0.2, 0.6, 0.1, 0.0))
PHASES = (
    Phase(0.03, (ECHO,)),
    Phase(0.18, (TINY,)),
    Phase(0.3, (TINY, SHORT, K_HALF)),
    Phase(0.55, (TINY, SHORT, K_HALF, K_ONE)),
    Phase(0.85, (TINY, SHORT, K_HALF, SHORT, K_ONE, K_TWO)),
    Phase(1.0, (WHOLE, SHORT, K_TWO, WHOLE, K_ONE)),  # most errors are left in whole prompts
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LladaSettings:
    """Numbers of the stage. Weights of the loss: of later blocks than the one that is decoded, of
    the filling after the first end-of-text token, of answers' tokens with all that they follow
    from before them, which one error in a long answer costs the rest of it, and of plain text.

    begin_at: the fraction of the phases and rates to begin with, as is fit for trained weights.
    """

    phases: tuple[Phase, ...] = PHASES
    begin_at: float = 0.0
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    warm_up: int = 50  # steps
    average_decay: float = 0.995
    later_weight: float = 0.1
    filling_weight: float = 0.05
    certain_weight: float = 3.0
    text_weight: float = 0.2
    bfloat16: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Batch:
    """clean: token ids; masked: which of them the model does not see; weight: of the loss, zero
    where nothing is masked; positions; labels: of the rows, numbers into `LABELS`. All but the last
    are [batch, tokens].
    """

    clean: Tensor
    masked: Tensor
    weight: Tensor
    positions: Tensor
    labels: Tensor


def _gaps(rng: np.random.Generator, tokens: int, prompt: int, reach: int) -> np.ndarray:
    """Positions of a row, with up to four gaps in its first `prompt` tokens every second time."""
    positions = np.arange(tokens)
    if reach <= tokens or prompt < 2 or rng.random() < 0.5:
        return positions
    count = int(rng.integers(1, 5))
    spare = int(rng.integers(reach - tokens + 1))
    skips = np.diff([0, *np.sort(rng.integers(0, spare + 1, count - 1)), spare])
    for place, skip in zip(rng.integers(1, prompt, count), skips, strict=True):
        positions[place:] += skip
    return positions


def _holes(begun: Tensor, lengths: Tensor) -> Tensor:
    """Holes of `lengths` tokens from where they are begun; they may run into each other."""
    chosen = begun.clone()
    for back in range(1, int(lengths.max())):
        chosen[back:] |= begun[:-back] & (lengths[:-back] > back)
    return chosen


def _any_of_last(chosen: Tensor, count: int) -> Tensor:
    """Whether one of the `count` before each is chosen."""
    found = torch.zeros_like(chosen)
    for back in range(1, count + 1):
        found[back:] |= chosen[:-back]
    return found


@dataclass(frozen=True)
class Rows:
    """Makes batches of a source's tasks and windows."""

    tokenizer: PreTrainedTokenizerFast
    source: Source
    ids: Tensor  # of the whole source
    settings: LladaSettings

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], settings: LladaSettings
    ) -> "Rows":
        """Counts and encodes the texts."""
        found = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = np.concatenate([np.asarray(encoding.ids, np.int16) for encoding in found])
        return cls(tokenizer, Source(texts, count_with(tokenizer)), torch.from_numpy(ids), settings)

    def batch(self, lengths: Lengths, seed: int, step: int) -> Batch:
        """A function of `(seed, step)` and the lengths alone."""
        rng = np.random.default_rng([seed, 2, step])
        tokens = lengths.prompt + lengths.answer
        labels = rng.choice(len(LABELS), lengths.batch, p=lengths.shares)
        rows, prompts = [], []
        for i, label in enumerate(labels.tolist()):
            if LABELS[label] == "text":
                start = int(rng.integers(len(self.ids) - tokens))
                rows.append(self.ids[start : start + tokens].tolist())
                prompts.append(0)
                continue
            if LABELS[label] == "echo":
                period = rng.integers(len(SPECIAL) + 2, len(self.tokenizer), rng.integers(12, 64))
                rows.append(np.resize(period, tokens).tolist())
                prompts.append(0)
                continue
            index = step * 1024 + i
            task = make_task(LABELS[label], seed, index, self.source, lengths.shape)
            prompt = encode_chat(self.tokenizer, [task.prompt])[0]
            answer = self.tokenizer.backend_tokenizer.encode(task.answer).ids
            row = prompt + answer
            row += [self.tokenizer.eos_token_id] * (tokens - len(row))
            rows.append(row[:tokens])
            prompts.append(len(prompt))
        clean = torch.tensor(rows)
        masked = torch.zeros(clean.shape, dtype=torch.bool)
        weight = torch.zeros(clean.shape)
        for row, (prompt, label) in enumerate(zip(prompts, labels.tolist(), strict=True)):
            share, drawn = rng.random(), torch.from_numpy(rng.random(tokens))
            chosen = drawn < max(share, 0.02)
            place = torch.arange(tokens) - prompt
            if LABELS[label] == "text":
                weight[row] = self.settings.text_weight
            elif LABELS[label] == "echo":
                weight[row], chosen = 1.0, drawn < 0.1 + 0.4 * share
            else:
                weight[row] = 1.0
                ends = clean[row] == self.tokenizer.eos_token_id
                weight[row][ends & ends.roll(1)] = self.settings.filling_weight
                kind = rng.random()
                if kind < 0.4:  # one block is being decoded, what comes later is masked
                    answered = max(1, int((~ends[prompt:]).sum()))
                    block = int(rng.integers(answered // BLOCK + 1))
                    if rng.random() < 0.6:  # known as far as a place
                        chosen = place >= block * BLOCK + int(rng.integers(BLOCK))
                    chosen &= place >= block * BLOCK
                    later = place >= (block + 1) * BLOCK
                    chosen |= later
                    weight[row][later] *= self.settings.later_weight
                elif kind < 0.9:  # a few holes, whose first tokens can be told for certain
                    begun, sizes = drawn < 0.02 + 0.08 * share, rng.integers(1, HOLE + 1, tokens)
                    begun[int(rng.integers(prompt, tokens))] = True  # one at least
                    chosen = _holes(begun, torch.from_numpy(sizes))
                chosen &= place >= 0
                certain = ~_any_of_last(chosen, SEEN) & ~ends
                weight[row][certain] *= self.settings.certain_weight
            masked[row] = chosen
        positions = [_gaps(rng, tokens, prompt, lengths.reach) for prompt in prompts]
        return Batch(
            clean,
            masked,
            weight * masked,
            torch.from_numpy(np.stack(positions)),
            torch.from_numpy(labels),
        )


def llada_step(model: EuroBertForMaskedLM, rows: Rows, settings: LladaSettings, seed: int):
    """The step function of the stage, and the parts of its checkpoint."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = Muon(matrices, lr=settings.muon_rate)
    adam = torch.optim.AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = Average({"model": model}, settings.average_decay)
    body = torch.compile(model.model, dynamic=False) if settings.compiled else model.model

    def step(index: int, progress: float) -> dict[str, float]:
        progress = settings.begin_at + (1 - settings.begin_at) * progress
        phase = next(p for p in settings.phases if progress <= p.until)
        lengths = phase.lengths[index % len(phase.lengths)]
        rate = min(1.0, (index + 1) / settings.warm_up) * min(1.0, 0.02 + (1 - progress) / 0.45)
        muon.param_groups[0]["lr"] = settings.muon_rate * rate
        adam.param_groups[0]["lr"] = settings.adam_rate * rate
        batch = rows.batch(lengths, seed, index)
        seen = batch.clean.masked_fill(batch.masked, rows.tokenizer.mask_token_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            states = body(input_ids=seen, position_ids=batch.positions).last_hidden_state
            logits = model.lm_head(states[batch.masked])
        asked, weight = batch.clean[batch.masked], batch.weight[batch.masked]
        losses = F.cross_entropy(logits.float(), asked, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        average.update(index)
        return _shown(lengths, batch, losses.detach(), logits.detach().argmax(1) == asked)

    return step, {"model": model, "muon": muon, "adam": adam, "average": average}


def _shown(lengths: Lengths, batch: Batch, losses: Tensor, right: Tensor) -> dict[str, float]:
    """Of the rows of each kind: the share of tokens of the decoded block that are right; of plain
    text the loss.
    """
    labels = batch.labels[:, None].expand_as(batch.masked)[batch.masked]
    counted = batch.weight[batch.masked] >= 1.0
    result = {}
    for number, kind in enumerate(LABELS):
        chosen = counted & (labels == number)
        if chosen.any():
            result[f"{kind}_{lengths.prompt}"] = right[chosen].float().mean().item()
    if (text := labels == LABELS.index("text")).any():
        result["text"] = losses[text].mean().item()
    return result
