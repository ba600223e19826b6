"""Compiles and exports every operation around attention in one graph, and compares with eager.

Run in a process of its own, without checked shapes: a compiler cannot look into the checks.
"""

import torch

from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.block_mass import block_mass
from accel.kernels.column_sums import column_sums
from accel.kernels.merge import merge
from accel.kernels.permute import permute
from accel.kernels.pooled_scores import pooled_scores
from accel.kernels.window_attention import window_attention

ORDER = torch.arange(39).flip(0)


class Operations(torch.nn.Module):
    """All of them in one graph."""

    def forward(self, q, k, v, lengths):
        options = {"kv_length": lengths, "order": ORDER}
        mass, lse = block_mass(q, k, block=(16, 8), **options)
        again, _ = block_mass(q, k, block=(16, 8), lse=lse, **options)
        coarse = antidiagonal_scores(q, k, block=(16, 8), stride=4, **options)
        pooled = pooled_scores(q, k, v, block=(16, 8), **options)
        received = column_sums(q, k, lse=lse, weights=q.new_ones(q.shape[0], 39))
        out, merged = merge([(q, lse), (q.mT.contiguous().mT, lse)])
        (out,) = permute(ORDER, out)
        inside = window_attention(q, q, q, ORDER[:28].view(4, 7))
        return mass, again, coarse, pooled, received, out, merged, inside


def same(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


if __name__ == "__main__":
    q, k, v = (torch.randn(3, heads, 39, 16) for heads in (4, 2, 2))
    arguments = (q, k, v, torch.tensor([39, 20, 0]))
    expected = Operations()(*arguments)
    same(torch.compile(Operations(), fullgraph=True, backend="aot_eager")(*arguments), expected)
    exported = torch.export.export(Operations(), arguments)
    same(exported.module()(*arguments), expected)
    print(*sorted({str(x.target) for x in exported.graph.nodes if "accel." in str(x.target)}))
