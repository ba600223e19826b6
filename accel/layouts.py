"""The layouts of one denoiser call: one for all of it, or by site, or by sample of the batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from accel.layout import Grid, Layout

__all__ = ["Layouts", "LayoutsLike", "Part", "parts_of", "valid_keys"]

LayoutsLike = Layout | Sequence[Layout] | Mapping[str, Layout]


@dataclass(frozen=True, slots=True)
class Layouts:
    """samples: one layout for every sample, or one for each; by_site: sites that see other tokens
    than these (SD3.5's second attention has no text, Latte's see space or time).
    """

    samples: tuple[Layout, ...] = ()
    by_site: Mapping[str, Layout] = field(default_factory=dict)

    @classmethod
    def of(cls, given: "Layouts | LayoutsLike") -> "Layouts":
        """From one layout, one for each sample, or one by site. Raises TypeError for others."""
        if isinstance(given, Layouts):
            return given
        if isinstance(given, Layout):
            return cls((given,))
        by_site = given if isinstance(given, Mapping) else {}
        samples = () if isinstance(given, Mapping) else tuple(given)
        if not given or not all(isinstance(x, Layout) for x in (*samples, *by_site.values())):
            raise TypeError(f"expected a Layout, one for each sample or one by site: {given!r:.80}")
        return cls(samples[:1] if len(set(samples)) == 1 else samples, by_site)

    def at(self, site: str) -> tuple[Layout, ...]:
        """One layout for all samples of a site's call, or one for each; none where it is unknown"""
        return (self.by_site[site],) if site in self.by_site else self.samples

    @property
    def longest(self) -> Layout:
        """The layout with the most tokens: what attention costs is spent there."""
        return max((*self.samples, *self.by_site.values()), key=lambda layout: layout.length)

    @property
    def grids(self) -> set[tuple[Grid, ...]]:
        """What is generated; the lengths of texts change from call to call."""
        return {layout.grids for layout in (*self.samples, *self.by_site.values())}


class Part(NamedTuple):
    """Samples of a call that are computed together: their rows of the batch, their layout, and the
    tokens it speaks of (None for all).
    """

    rows: slice
    layout: Layout
    tokens: Int[Tensor, " valid"] | None
    name: str  # "" for the whole batch, else which sample

    def cut(self, x: Tensor) -> Tensor:
        """The rows and tokens of x `[batch, heads, tokens, dim]`."""
        x = x[self.rows]
        return x if self.tokens is None else x[:, :, self.tokens]

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write x in its place in out; what is padding inside becomes zero."""
        if self.tokens is None:
            out[self.rows] = x
        else:
            out[self.rows] = 0
            out[self.rows, :, self.tokens] = x


def parts_of(layouts: tuple[Layout, ...], device: torch.device) -> Iterator[Part]:
    """A call cut into parts of one layout each: the whole batch, or sample by sample."""
    for sample, layout in enumerate(layouts):
        whole = len(layouts) == 1
        rows, name = (slice(None), "") if whole else (slice(sample, sample + 1), f"[{sample}]")
        if layout.padded_inside:
            tokens = layout.valid(device).nonzero()[:, 0]
            yield Part(rows, layout.without_padding(), tokens, name)
        else:
            yield Part(rows, layout, None, name)


def valid_keys(layouts: tuple[Layout, ...], device: torch.device) -> Bool[Tensor, "samples length"]:
    """Which tokens are no padding, for every sample; or one row for all."""
    return torch.stack([layout.valid(device) for layout in layouts])
