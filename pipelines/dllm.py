"""A pipeline for masked diffusion language models of LLaDA's kind: any model, any batch, any rule.

`accel.enable(pipe, plan)` makes it faster; a plan's cache and decoding are followed where the call
does not say otherwise.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from accel.commit import Generators, Sampling
from accel.decoding import Decoding
from accel.errors import AccelError
from accel.pipelines.enable import plan_of, resting
from accel.pipelines.text_checkpoint import is_pipeline, load_checkpoint
from accel.pipelines.text_generation import Asked, Generation
from accel.pipelines.text_host import TextHost
from accel.pipelines.text_prompts import encoded, left_padded, together

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

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], **load: Any
    ) -> "MaskedDiffusionPipeline":
        """From a folder that `save_pretrained` wrote, or a repository of the hub that holds one; or
        from a checkpoint of transformers alone.

        load: of diffusers' or transformers' `from_pretrained`, as dtype, and the arguments of this
        class; `trust_remote_code=True` for a model whose code comes with it.
        """
        if is_pipeline(path, **load):
            return super().from_pretrained(path, **load)
        own = {k: load.pop(k) for k in ("shift_logits", "mask_token_id") if k in load}
        model, tokenizer = load_checkpoint(path, **load)
        return cls(model.eval(), tokenizer, **own)

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
        self._check(gen_length, prompt_length, guidance_scale, eos)
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
        shift = self.config.shift_logits
        asked = Asked(gen_length, decoding, sampling, num_inference_steps, mask_id, ends, shift)
        run = Generation(self.host, plan, asked, ids, real)
        with (
            resting(self.model, prompt_length + gen_length),
            self.progress_bar(total=gen_length) as bar,
        ):
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
            return left_padded(input_ids.to(device), attention_mask)
        if attention_mask is not None:
            raise AccelError("attention_mask belongs to input_ids; texts are padded here")
        return together(self.prompt_ids(prompt, messages, use_chat_template), device)

    def prompt_ids(
        self,
        prompt: str | Sequence[str] | None = None,
        messages: Any = None,
        use_chat_template: bool = True,
    ) -> list[list[int]]:
        """Token ids of every prompt, as a call has them before what it generates."""
        if self.tokenizer is None:
            raise AccelError("this pipeline has no tokenizer; give input_ids")
        return encoded(self.tokenizer, prompt, messages, use_chat_template)

    def _check(self, gen_length: int, prompt_length: int, guidance_scale: float, eos: str) -> None:
        if type(gen_length) is not int or gen_length < 1:
            raise AccelError(f"gen_length is a number of tokens, at least 1, got {gen_length!r}")
        longest = self.host.longest
        if longest is not None and prompt_length + gen_length > longest:
            raise AccelError(
                f"{prompt_length} tokens of prompt and gen_length {gen_length} are more than the"
                f" {longest} that the model was made for; shorten either"
            )
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


def _with(base: Decoding, **given: Any) -> Decoding:
    """`base` with what a call says; another rule does not take over the bound."""
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("rule", base.rule) != base.rule and "bound" not in said:
        said["bound"] = None
    return replace(base, **said)
