"""HiPrune's choice of tokens by how much attention each gets in two layers (arXiv 2508.00553)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from accel.errors import AccelError

__all__ = ["hierarchical"]

Scores = Float[Tensor, "batch patches"]


def hierarchical(
    objects: Scores, output: Scores, grid: tuple[int, int], budget: int, *, alpha: float = 0.1
) -> Int[Tensor, "batch budget"]:
    """The `budget` patches of each image that are kept, in the order of the image.

    Anchors are the ``round(alpha · budget / 5)`` patches that get most in the object layer. Buffers
    are their neighbours above, below, left and right. Registers are those of all others that get
    most in the output layer, until the budget is full. Of equal scores the first wins.

    objects, output: attention that the patches get in the two layers. grid: their rows and columns.

    Where anchors and buffers are more than the budget, anchors come first, then buffers by the
    output layer. A patch at the border has fewer neighbours (HiPrune's code takes the end of the
    row before for the left neighbour of a row's first patch).
    """
    rows, columns = grid
    if objects.shape[1] != rows * columns:
        raise AccelError(f"{objects.shape[1]} scores are not those of {rows} x {columns} patches")
    if not 1 <= budget <= rows * columns:
        raise AccelError(f"budget is a number of patches from 1 to {rows * columns}, got {budget}")
    if not 0 <= alpha <= 1:
        raise AccelError(f"alpha, the share of anchors and buffers, is in [0, 1], got {alpha}")
    anchors = torch.zeros_like(objects, dtype=torch.bool)
    anchors.scatter_(1, _ranked(objects)[:, : round(alpha * budget / 5)], True)
    # anchors before buffers before registers, then by score
    order = _ranked(output)
    places = torch.arange(rows * columns, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, places)
    kind = 2 - anchors.long() - _with_neighbours(anchors, grid).long()
    first = (kind * rows * columns + rank).argsort(dim=1)[:, :budget]
    return first.sort(dim=1).values


def _ranked(scores: Scores) -> Int[Tensor, "batch patches"]:
    return scores.argsort(dim=1, descending=True, stable=True)


def _with_neighbours(
    chosen: Bool[Tensor, "batch patches"], grid: tuple[int, int]
) -> Bool[Tensor, "batch patches"]:
    """The chosen patches, and those beside, above and below them."""
    patches = chosen.reshape(-1, *grid)
    found = patches.clone()
    found[:, 1:] |= patches[:, :-1]
    found[:, :-1] |= patches[:, 1:]
    found[:, :, 1:] |= patches[:, :, :-1]
    found[:, :, :-1] |= patches[:, :, 1:]
    return found.flatten(1)
