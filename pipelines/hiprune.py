"""Which tokens of a vision encoder a language model needs: HiPrune (arXiv 2508.00553).

For encoders of timm and of transformers (CLIP, SigLIP, ...) as they are: their attention is seen at
its SDPA calls, and how much each patch gets is summed by a fused kernel, never from the map.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from accel.errors import AccelError, UnsupportedModelError
from accel.pipelines.enable import untouched
from accel.pipelines.seen_calls import Seen, SeenCalls
from accel.token_choice import hierarchical
from accel.token_scores import mass_scores

__all__ = ["select"]


@torch.no_grad()
def select(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    budget: int,
    *,
    alpha: float = 0.1,
    layer: int | None = None,
    output: int = -1,
    grid: tuple[int, int] | None = None,
) -> Int[Tensor, "batch budget"]:
    """The numbers of the `budget` patches of each image that are to be kept, ascending.

    Patch j is scored in layer l by the attention that it gets,
    ``g_l(j) = mean over heads h and queries i of softmax(q_i kᵀ · scale)[h, i, j]``, over all
    queries, prefix tokens too. Anchors are the ``round(alpha · budget / 5)`` patches with the
    highest g in `layer`, buffers their four neighbours, and registers fill the budget by g in
    `output` (`accel.token_choice`). The patches of the prefix (class, registers) are not counted:
    the features of patch j are those of token ``prefix + j``.

    layer: of objects; None: at three eighths of the depth, 9 of 24 as for LLaVA's CLIP-L. output:
        whose features the language model gets; LLaVA takes the last but one, -2. Both from 0,
        negative ones from the end.
    grid: rows and columns of patches, where the model does not say (a patch size is looked for).
    An enabled model runs as it would without accel.
    """
    patches = _grid(model, images) if grid is None else grid
    depth = _depth(model)
    wanted = [depth * 3 // 8 if layer is None else layer, output]
    for name, number in zip(("layer", "output"), wanted, strict=True):
        if not -depth <= number < depth:
            raise AccelError(f"{name} is one of the model's {depth} layers, got {number}")
    numbers = [number % depth for number in wanted]
    with untouched(model), SeenCalls(frozenset(numbers)) as calls:
        model(images)
    if calls.count != depth:
        raise UnsupportedModelError(
            f"of {depth} layers of this {type(model).__name__}, {calls.count} called"
            " scaled_dot_product_attention; load it with attn_implementation='sdpa', or build it"
            " with timm.layers.set_fused_attn(True)"
        )
    count = patches[0] * patches[1]
    objects, last = (_scores(calls.kept[number], count) for number in numbers)
    return hierarchical(objects, last, patches, budget, alpha=alpha)


def _scores(seen: Seen, patches: int) -> Float[Tensor, "batch patches"]:
    """What the patches, the last tokens of a layer, get."""
    if seen.k.shape[2] < patches:
        raise AccelError(
            f"the model has {seen.k.shape[2]} tokens, fewer than the grid's {patches} patches;"
            " pass grid="
        )
    return mass_scores(seen.q, seen.k, scale=seen.scale, bias=seen.mask)[:, -patches:]


def _depth(model: Any) -> int:
    """Layers of an encoder of timm, or of transformers."""
    if hasattr(model, "blocks"):
        return len(model.blocks)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no `blocks`, and no num_hidden_layers in its config;"
            " give the vision encoder itself"
        )
    return int(config.num_hidden_layers)


def _grid(model: Any, images: Tensor) -> tuple[int, int]:
    sides = images.shape[2], images.shape[3]
    if hasattr(model, "patch_embed"):
        rows, columns = model.patch_embed.dynamic_feat_size(sides)
        return int(rows), int(columns)
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if not isinstance(patch, int):
        raise UnsupportedModelError(
            f"the patch size of this {type(model).__name__} is unknown; pass grid="
        )
    return sides[0] // patch, sides[1] // patch
