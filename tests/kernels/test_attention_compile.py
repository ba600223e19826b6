"""Attention is one opaque operation: it compiles without a break, exports, and keeps its schema."""

import subprocess
import sys

import pytest
import torch
from attention_cases import Case

from accel.kernels.attention import sparse_attention

# without the tests' import hook: the checks it puts around functions cannot be traced
COMPILED = """
import torch
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask

def attend(q, k, v, mask, lengths):
    return sparse_attention(
        q * 2, k, v, mask, rest="taylor", kv_length=lengths, backend="cpu", return_lse=True
    )

def problem(batch, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, tokens, 16, generator=generator) for _ in range(3))
    keep = torch.rand(2, -(-tokens // 32), -(-tokens // 16), generator=generator) < 0.5
    mask = BlockMask.from_dense(keep, block=(32, 16), q_length=tokens, kv_length=tokens)
    return q, k, v, mask, torch.arange(batch) * tokens // batch + 1

class Site(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        return sparse_attention(q, k, v, self.mask, rest=["mean", "drop"], backend="cpu") + 1

torch.set_num_threads(1)
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
for args in (problem(2, 63, 0), problem(2, 63, 1), problem(3, 90, 2)):
    for x, y in zip(compiled(*args), attend(*args), strict=True):
        assert torch.equal(x, y)

q, k, v, mask, _ = problem(2, 63, 3)
exported = torch.export.export(Site(mask), (q, k, v))
assert "accel.sparse_attention" in str(exported.graph)
assert torch.equal(exported.module()(q, k, v), Site(mask)(q, k, v))
print("done")
"""


def test_compiles_and_exports():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("padded", [False, True])
def test_the_operation_is_what_its_schema_says(padded, generator):
    case = Case(2, 2, 1, 63, 63, 16, (32, 16), orders=2 * padded, padded=padded)
    q, k, v = case.tensors(generator, torch.bfloat16)
    mask, options = case.mask(case.dense_keep(generator)), case.options(generator)
    lists = (mask.counts, mask.indices, mask.longest_first)
    arguments = (*lists, [32, 16], [1, 2], 0.25)
    arguments += (options.get("kv_length"), options.get("order"), "full", "cpu")
    torch.library.opcheck(
        torch.ops.accel.sparse_attention.default,
        (q.mT.contiguous().mT, k, v, *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert sparse_attention(q, k, v, mask, rest="taylor").is_contiguous()


def test_gradients_are_refused(generator):
    case = Case(1, 2, 1, 63, 63, 16, (32, 16))
    q, k, v = case.tensors(generator)
    mask = case.mask(case.dense_keep(generator))
    with pytest.raises(NotImplementedError, match="no gradients"):
        sparse_attention(q, k.requires_grad_(), v, mask)
    with torch.no_grad():
        sparse_attention(q, k, v, mask)
