"""Every dense attention is softmax(q kT / sqrt(dim)) v, and what is expected to be fastest too."""

import pytest
import torch

from accel.dense import dense_attentions, usual_dense

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROWS = 300  # more than the rows of one chunk, and no multiple of them


def attention(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_agree(device, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, ROWS, 2, 64, generator=generator).to(device, dtype).transpose(1, 2)
        for _ in range(3)
    )
    truth = attention(q, k, v)
    found = dense_attentions(torch.device(device))
    ran = 0
    for dense in (usual_dense, *found.values()):
        try:
            out = dense(q, k, v)
        except RuntimeError:
            # one that is not made for this dtype or card
            continue
        ran += 1
        error = float((out.double() - truth).norm() / truth.norm())
        assert error < (1e-6 if dtype == torch.float32 else 8e-3)
    assert ran >= 2
    assert device == "cuda" or ran == 1 + len(found)
