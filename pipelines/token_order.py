"""How models lay out tokens: what the adapters share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from accel.layout import Grid, SegmentKind

Run = tuple[SegmentKind, int]


def patched(shape: Sequence[int], patch: Sequence[int]) -> Grid:
    """The grid of latents [..., t, h, w] cut into patches of (t, h, w)."""
    t, h, w = (int(n) // p for n, p in zip(shape[-3:], patch, strict=True))
    return t, h, w


def image_grid(model: nn.Module, hidden_states: Tensor) -> Grid:
    """The grid of an image [batch, channels, h, w] whose model has one `patch_size`."""
    patch: int = model.config.patch_size  # type: ignore[union-attr,assignment]
    return patched((1, *hidden_states.shape[-2:]), (1, patch, patch))


def image_and_rest(ids: Tensor) -> tuple[Grid, int] | str:
    """The generated image, and the number of tokens after it, which are of reference images.

    ids: `[tokens, axes]` or `[batch, tokens, axes]`; the first axis tells images apart, the next
    two are row and column, in raster order. A text says why the image is no raster.
    """
    table = (ids[0] if ids.ndim == 3 else ids)[:, :3].long().cpu()
    own = table[table[:, 0].eq(table[0, 0]).cumprod(0).bool(), 1:]
    h, w = (own.amax(0) - own.amin(0) + 1).tolist()
    raster = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + own[0]
    if not torch.equal(raster, own):
        return f"the positions of the {len(own)} image tokens (img_ids) are no raster"
    return (1, h, w), len(table) - len(own)


def runs_of_mask(mask: list[bool]) -> list[Run]:
    """Text and padding in turn, as a sample's mask of its text has them."""
    runs: list[Run] = []
    for valid in mask:
        kind: SegmentKind = "text" if valid else "pad"
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + 1)
        else:
            runs.append((kind, 1))
    return runs
