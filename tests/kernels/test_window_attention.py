"""Attention in gathered windows against the plain computation, window by window."""

import pytest
import torch
from paths import take

from accel.kernels.window_attention import window_attention


@pytest.fixture(params=["native", "torch"], autouse=True)
def _path(request, monkeypatch):
    take(request.param, monkeypatch)


def tensors(generator, batch=3, heads=2, tokens=75, dim=24):
    return [torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3)]


def choose(generator, kept, size, tokens=75):
    return torch.randperm(tokens, generator=generator)[: kept * size].view(kept, size)


def plain(q, k, v, windows, bias=None, scale=None):
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for b in range(q.shape[0]):
        for window in windows if windows.ndim == 2 else windows[b]:
            logits = q[b][:, window] @ k[b][:, window].mT * scale
            logits = logits if bias is None else logits + bias
            out[b][:, window] = logits.softmax(-1) @ v[b][:, window]
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "one each"])
@pytest.mark.parametrize(("kept", "size"), [(1, 7), (4, 16), (5, 15), (2, 33)])
def test_is_attention_in_every_window(kept, size, own, biased, generator):
    q, k, v = tensors(generator)
    windows = choose(generator, kept, size)
    if own:
        windows = torch.stack([windows, *(choose(generator, kept, size) for _ in range(2))])
    bias = torch.randn(2, size, size, generator=generator) if biased else None
    out = window_attention(q, k, v, windows, bias=bias, scale=0.3)
    truth = plain(q, k, v, windows, bias, scale=0.3)
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=1e-5)
    kept_tokens = windows.flatten() if not own else windows[0].flatten()
    rest = torch.ones(75, dtype=torch.bool)
    rest[kept_tokens] = False
    assert (out[0][:, rest] == 0).all()


def test_no_window_is_nothing(generator):
    q, k, v = tensors(generator)
    out = window_attention(q, k, v, torch.empty(0, 16, dtype=torch.int64))
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.tensor([[0, 1], [2, 75]]), r"tokens 0\.\.74, got 0\.\.75"),
        (torch.tensor([[0, 1], [1, 2]]), "token 1 is in 2 places"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), "1 or 3 batch elements"),
    ],
)
def test_refuses(windows, message, generator):
    with pytest.raises(ValueError, match=message):
        window_attention(*tensors(generator), windows)


def test_refuses_a_bias_of_another_size(generator):
    with pytest.raises(ValueError, match=r"bias must be \[2, 5, 5\]"):
        window_attention(*tensors(generator), choose(generator, 3, 5), bias=torch.zeros(2, 4, 4))
