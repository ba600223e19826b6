"""A Wan transformer of any size with random weights, and one call of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import AccelError, nearest
from accel.pipelines.bench.case import Case
from accel.pipelines.host import DTYPES
from accel.untrusted import check_whole, finite

PATCH = (1, 2, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class WanStep:
    """Sizes of the transformer and of one call: latents [batch, channels, t, h, w], text [tokens,
    dim]; the keep of the plan.
    """

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    latents: tuple[int, int, int, int, int]
    text: tuple[int, int]
    keep: float
    dtype: str

    @classmethod
    def of(cls, given: Mapping[str, Any], dtype: Any) -> "WanStep":
        """The settings of a configuration; raises AccelError naming the value that cannot be.

        dtype: that of weights and latents; None: bfloat16.
        """
        known = [name for name in cls.__slots__ if name != "dtype"]
        for name in given:
            if name not in known:
                raise AccelError(f"wan_step.{name} is unknown; {nearest(name, known)}")
        for name in ("layers", "heads", "head_dim", "ffn_dim"):
            check_whole(f"wan_step.{name}", given[name], 1)
        for name, length in (("latents", 5), ("text", 2)):
            sizes = given[name]
            if not isinstance(sizes, list | tuple) or len(sizes) != length:
                raise AccelError(f"wan_step.{name} is {sizes!r}; it is a list of {length} sizes")
            for size in sizes:
                check_whole(f"wan_step.{name}", size, 1)
        if given["latents"][3] % PATCH[1] or given["latents"][4] % PATCH[2]:
            raise AccelError(
                f"wan_step.latents is {given['latents']}; height and width are multiples of 2"
            )
        if not finite(given["keep"]) or not 0 < given["keep"] <= 1:
            raise AccelError(f"wan_step.keep is {given['keep']!r}; it is a fraction in (0, 1]")
        dtype = "bfloat16" if dtype is None else dtype
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise AccelError(f"dtype is {dtype!r}; kernel=wan_step takes one of {[*DTYPES]}")
        sizes = {name: tuple(given[name]) for name in ("latents", "text")}
        return cls(**{**given, **sizes}, dtype=dtype)

    @property
    def case(self) -> Case:
        """The self-attention of the step."""
        batch, _, *grid = self.latents
        t, h, w = (size // patch for size, patch in zip(grid, PATCH, strict=True))
        return Case(
            shape="wan-step",
            batch=batch,
            heads=self.heads,
            tokens=t * h * w,
            dim=self.head_dim,
            dtype=self.dtype,
        )


class Step:
    """A model and the arguments of one call."""

    def __init__(self, model: nn.Module, arguments: dict[str, Tensor]) -> None:
        self.model, self._arguments = model, arguments

    def __call__(self) -> Tensor:
        return self.model(**self._arguments, return_dict=False)[0]


def random_step(size: WanStep, device: torch.device) -> Step:
    """A Wan transformer of this size with random weights, and a call of it."""
    from diffusers import WanTransformer3DModel

    dtype = DTYPES[size.dtype]
    batch, channels, *_ = size.latents
    with _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        model: Any = WanTransformer3DModel(
            patch_size=PATCH,
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=size.text[1],
            freq_dim=256,
            ffn_dim=size.ffn_dim,
            num_layers=size.layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        )
        arguments = {
            "hidden_states": torch.randn(size.latents),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, *size.text),
        }
    return Step(model.eval(), arguments)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are born in the dtype: twice their size may not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
