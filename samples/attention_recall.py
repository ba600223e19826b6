"""How much softmax mass the best quarter of the key blocks holds, per self-attention head of a Wan
transformer.

For a head, an order of the tokens and 64x64 blocks: sum the exact softmax probabilities inside
every block, keep in each query-block row the largest quarter of the blocks, and average the kept
mass over the rows. The recall of the head is the best over the six axis orders and one tile order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

__all__ = ["best_block_recall", "measured_recall", "token_orders"]


def token_orders(grid: tuple[int, int, int], tile: int = 4) -> dict[str, Tensor]:
    """Permutations of the tokens of `grid` (t, h, w): the axis orders (slowest axis first) and
    cubic tiles.
    """
    index = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    orders = {
        "".join("thw"[a] for a in axes): index.permute(axes).flatten()
        for axes in permutations(range(3))
    }
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).view(
        -1, 3
    )
    key = torch.zeros(len(place), dtype=torch.long)
    for value, size in zip(
        (*(place // tile).T, *(place % tile).T), (*grid, *(tile,) * 3), strict=True
    ):
        key = key * size + value
    return {**orders, f"tile{tile}": key.argsort()}


@torch.no_grad()
def best_block_recall(
    query: Tensor, key: Tensor, grid: tuple[int, int, int], *, keep: float, block: int
) -> dict[str, Tensor]:
    """Recall `[heads]` for each order, from rotated queries and keys `[heads, tokens, dim]`."""
    heads, tokens, dim = query.shape
    orders = token_orders(grid)
    blocks = -(-tokens // block)
    owner = torch.stack(
        [
            torch.empty(tokens, dtype=torch.long).scatter_(0, o, torch.arange(tokens) // block)
            for o in orders.values()
        ]
    )
    member = torch.nn.functional.one_hot(owner, blocks).float()  # [orders, tokens, blocks]
    recall = torch.zeros(len(orders), heads)
    kept = max(1, round(keep * blocks))
    for head in range(heads):
        mass = torch.zeros(len(orders), blocks, blocks)
        for rows in torch.arange(tokens).split(1088):
            probability = torch.softmax(query[head, rows] @ key[head].T * dim**-0.5, -1)
            mass += member[:, rows].transpose(1, 2) @ (probability @ member)
        share = mass / member.sum(1)[:, :, None]
        recall[:, head] = share.topk(kept, -1).values.sum(-1).mean(-1)
    return dict(zip(orders, recall, strict=True))


class _Recorder(WanAttnProcessor):
    """The processor of diffusers that also measures recall while `record` is true."""

    def __init__(self, layer: int, state: dict) -> None:
        super().__init__()
        self.layer, self.state = layer, state

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ) -> Tensor:
        if self.state["record"]:
            cosine, sine = rotary_emb
            rotation = torch.complex(cosine[..., 0::2].float(), sine[..., 1::2].float())
            rotated = [
                torch.view_as_real(
                    torch.view_as_complex(x.unflatten(2, (attn.heads, -1, 2))) * rotation
                )
                .flatten(3)[0]
                .transpose(0, 1)
                for x in (
                    attn.norm_q(attn.to_q(hidden_states)),
                    attn.norm_k(attn.to_k(hidden_states)),
                )
            ]
            recall = best_block_recall(
                *rotated, self.state["grid"], keep=self.state["keep"], block=self.state["block"]
            )
            self.state["recalls"].setdefault(self.layer, []).append(recall)
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
        )


@contextmanager
def measured_recall(
    transformer: WanTransformer3DModel,
    grid: tuple[int, int, int],
    *,
    keep: float = 0.25,
    block: int = 64,
) -> Iterator[dict]:
    """Within the context calls are measured while `state["record"]`; results gather in
    `state["recalls"][layer]`.
    """
    state = {"record": True, "recalls": {}, "grid": grid, "keep": keep, "block": block}
    before = [block_.attn1.processor for block_ in transformer.blocks]
    for layer, block_ in enumerate(transformer.blocks):
        block_.attn1.set_processor(_Recorder(layer, state))
    try:
        yield state
    finally:
        for block_, processor in zip(transformer.blocks, before, strict=True):
            block_.attn1.set_processor(processor)


def summarise(recalls: dict[int, list[dict[str, Tensor]]]) -> list[list[tuple[float, str]]]:
    """Per layer and head: mean recall over the calls and the order that gives it."""
    table = []
    for layer in sorted(recalls):
        names = list(recalls[layer][0])
        mean = torch.stack(
            [torch.stack([call[name] for name in names]) for call in recalls[layer]]
        ).mean(0)
        table.append(
            [(float(value), names[int(order)]) for value, order in zip(*mean.max(0), strict=True)]
        )
    return table
