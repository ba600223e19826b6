"""A vision transformer with merged or fused tokens as loops over images and tokens, in float64."""

import copy
from itertools import chain

import torch
from torch.nn import functional as F


def heads(x, block):
    """q, k, v of one image by the weights of a block's attention, in float64."""
    attn = block.attn
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, bias).reshape(len(x), 3, attn.num_heads, -1)
    q, k, v = qkv.permute(1, 2, 0, 3)
    return attn.q_norm(q), attn.k_norm(k), v


def turned(x, table, prefix):
    """Tokens behind the prefix, turned by rows of sines and cosines, pair by pair."""
    sin, cos = table.chunk(2, -1)
    plain, rest = x[:, :prefix], x[:, prefix:]
    pairs = torch.stack([-rest[..., 1::2], rest[..., 0::2]], -1).flatten(-2)
    return torch.cat([plain, rest * cos + pairs * sin], 1)


def fed(x, block):
    """A block behind its attention."""
    out = block.mlp(block.norm2(x))
    if getattr(block, "gamma_2", None) is not None:
        return x + block.gamma_2 * out
    return x + (block.ls2(out) if hasattr(block, "ls2") else out)


def reference(model, image, keeps, *, method, score="class", proportional=True):
    """Features of one image behind every block, by loops over tokens in float64."""
    model = copy.deepcopy(model).double()
    embedded = model._pos_embed(model.patch_embed(image[None].double()))
    embedded, table = embedded if isinstance(embedded, tuple) else (embedded, None)
    table = None if table is None else table.double()
    x = model.norm_pre(embedded)[0]
    prefix = model.num_prefix_tokens
    patches = len(x) - prefix
    groups = [[i] for i in range(patches)]
    places = list(range(patches))
    taps = []
    for block, keep in zip(model.blocks, keeps, strict=True):
        q, k, v = heads(block.norm1(x), block)
        if table is not None:
            q, k = (turned(t, table[places], prefix) for t in (q, k))
        size = torch.tensor([1.0] * prefix + [len(g) for g in groups]).double()
        logits = q @ k.mT * q.shape[-1] ** -0.5 + (size.log() if proportional else 0)
        probabilities = logits.softmax(-1)
        out = (probabilities @ v).transpose(0, 1).flatten(1)
        out = block.attn.proj(block.attn.norm(out))
        scale = getattr(block, "ls1", None) or (lambda t: t)
        if getattr(block, "gamma_1", None) is not None:
            scale = lambda t, block=block: block.gamma_1 * t  # noqa: E731
        x = x + scale(out)
        count = len(groups) if keep is None else int(keep * patches + 0.5)
        if count < len(groups):
            tokens, counts = list(x[prefix:]), [len(g) for g in groups]
            if method == "merge":
                keys = F.normalize(k.mean(0)[prefix:], dim=1)
                pairs = []
                for a in range(1, len(groups), 2):
                    likeness = [float(keys[a] @ keys[b]) for b in range(0, len(groups), 2)]
                    pairs.append((max(likeness), a, 2 * likeness.index(max(likeness))))
                pairs.sort(key=lambda p: -p[0])
                joins = {b: [b] for b in range(len(groups))}
                for _, a, b in pairs[: len(groups) - count]:
                    joins[b] += joins.pop(a)
                order = [a for a in range(1, len(groups), 2) if a in joins]
                order += range(0, len(groups), 2)
                parts = [(joins[i], [counts[j] for j in joins[i]]) for i in order]
            else:
                rows = probabilities.mean(0)
                weights = size if proportional else torch.ones_like(size)
                total = rows[0] if score == "class" else (weights[:, None] * rows).sum(0)
                marks = total[prefix:].tolist()
                ranks = sorted(range(len(groups)), key=lambda i: -marks[i])
                parts = [([i], [1.0]) for i in sorted(ranks[: count - 1])]
                parts.append((ranks[count - 1 :], [marks[i] for i in ranks[count - 1 :]]))
            means = [
                sum(tokens[i] * w for i, w in zip(members, ws, strict=True)) / sum(ws)
                for members, ws in parts
            ]
            x = torch.cat([x[:prefix], torch.stack(means)])
            groups, places = (
                [list(chain(*(groups[i] for i in members))) for members, _ in parts],
                [places[members[0]] for members, _ in parts],
            )
        x = fed(x, block)
        whole = torch.empty(patches, x.shape[1], dtype=x.dtype)
        for token, members in zip(x[prefix:], groups, strict=True):
            whole[members] = token
        taps.append(torch.cat([x[:prefix], whole]))
    return taps
