"""Attention in gathered windows against the plain computation, window by window."""

from functools import partial

import pytest
import torch
from paths import take

from accel.kernels.window_attention import window_attention as operation


@pytest.fixture(params=["native", "torch", "triton"])
def window_attention(request, monkeypatch):
    """The operation, in every way it is computed."""
    path = take(request.param, monkeypatch)
    return partial(path.run, operation)


def tensors(generator, batch=3, heads=2, tokens=75, dim=24):
    return [torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3)]


def choose(generator, kept, size, tokens=75):
    return torch.randperm(tokens, generator=generator)[: kept * size].view(kept, size)


def plain(q, k, v, windows, bias=None, masks=None, kind=None, scale=None):
    """In float64, window by window."""
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    for b in range(q.shape[0]):
        for i, window in enumerate(windows if windows.ndim == 2 else windows[b]):
            logits = q[b][:, window] @ k[b][:, window].mT * scale
            logits = logits if bias is None else logits + bias
            if masks is not None:
                logits = logits + masks[kind[i] if kind.ndim == 1 else kind[b, i]]
            out[b][:, window] = logits.softmax(-1) @ v[b][:, window]
    return out


def case(generator, kept, size, own, biased, masked):
    """Windows for all batch elements or each its own; and what is added to their logits."""
    windows = choose(generator, kept, size)
    kind = torch.randint(3, (kept,), generator=generator)
    if own:
        windows = torch.stack([windows, *(choose(generator, kept, size) for _ in range(2))])
        kind = torch.randint(3, (3, kept), generator=generator)
    bias = torch.randn(2, size, size, generator=generator) if biased else None
    masks = torch.where(torch.rand(3, size, size, generator=generator) < 0.3, -100.0, 0.0)
    return windows, {"bias": bias} | ({"masks": masks, "kind": kind} if masked else {})


# every pair of a size, windows of one's own, a bias and masks is met
CASES = [
    *(((1, 7), False, False, False), ((1, 7), True, True, True), ((4, 16), False, True, True)),
    *(((4, 16), True, False, False), ((5, 15), False, True, False), ((5, 15), True, False, True)),
    *(((2, 33), False, False, True), ((2, 33), True, True, False)),
]


@pytest.mark.parametrize(("sizes", "own", "biased", "masked"), CASES)
def test_is_attention_in_every_window(window_attention, sizes, own, biased, masked, generator):
    kept, size = sizes
    q, k, v = tensors(generator)
    windows, added = case(generator, kept, size, own, biased, masked)
    out = window_attention(q, k, v, windows, scale=0.3, **added)
    truth = plain(q, k, v, windows, scale=0.3, **added)
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=1e-5)
    rest = torch.ones(75, dtype=torch.bool)
    rest[(windows[0] if own else windows).flatten()] = False
    assert (out[0][:, rest] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near(window_attention, dtype, generator):
    """At most twice as far from the truth as the plain computation in the same precision."""
    q, k, v = (x.to(dtype) for x in tensors(generator))
    windows, added = case(generator, 4, 16, True, True, True)
    out = window_attention(q, k, v, windows, **added)
    assert out.dtype == dtype
    truth = plain(q, k, v, windows, **added)
    naive = torch.zeros_like(out)
    for b in range(3):
        for i, window in enumerate(windows[b]):
            logits = q[b][:, window] @ k[b][:, window].mT * 24**-0.5
            logits = logits + added["bias"].to(dtype) + added["masks"][added["kind"][b, i]]
            naive[b][:, window] = logits.to(dtype).softmax(-1) @ v[b][:, window]
    assert (out - truth).abs().max() <= 2 * (naive - truth).abs().max()


def test_a_strided_view_of_one_projection(window_attention, generator):
    """As blocks have it: [tokens, 3, heads, dim]; every token is in a window."""
    qkv = torch.randn(3, 70, 3, 2, 24, generator=generator)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    windows = torch.arange(70).view(10, 7)
    _, added = case(generator, 10, 7, False, True, True)
    out = window_attention(q, k, v, windows, **added)
    truth = plain(q, k, v, windows, **added)
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=1e-5)


def test_a_window_of_many_tiles(window_attention, generator):
    q, k, v = tensors(generator, batch=1, tokens=230, dim=16)
    windows = torch.randperm(230, generator=generator)[None]
    bias = torch.randn(2, 230, 230, generator=generator)
    out = window_attention(q, k, v, windows, bias=bias)
    truth = plain(q, k, v, windows, bias=bias)
    torch.testing.assert_close(out.double(), truth, atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_attention_in_every_window(generator):
    windows, added = case(generator, 4, 15, True, True, True)
    grads = []
    for function in (operation, plain):
        inputs = [x.requires_grad_() for x in tensors(torch.Generator().manual_seed(3))]
        bias = added["bias"].clone().requires_grad_()
        out = function(*inputs, windows, **{**added, "bias": bias})
        out.double().square().sum().backward()
        grads.append([x.grad for x in (*inputs, bias)])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_autocast_gives_what_is_asked_in_the_precision_of_q(generator):
    q, k, v = tensors(generator)
    windows, added = case(generator, 4, 15, True, True, True)
    with torch.autocast("cpu", torch.bfloat16):
        out = operation(q, k, v, windows, **added)
    assert out.dtype == q.dtype
    truth = plain(q, k, v, windows, **added)
    torch.testing.assert_close(out.double(), truth, atol=0.05, rtol=0.05)


def test_no_window_is_nothing(window_attention, generator):
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
        operation(*tensors(generator), windows)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"bias": torch.zeros(2, 4, 4)}, r"bias must be \[2, 5, 5\]"),
        ({"masks": torch.zeros(2, 5, 5)}, "masks and kind come together"),
        ({"masks": torch.zeros(2, 4, 4), "kind": torch.zeros(3).int()}, r"\[kinds, 5, 5\]"),
        ({"masks": torch.zeros(2, 5, 5), "kind": torch.zeros(2).int()}, "kind must be"),
        ({"masks": torch.zeros(2, 5, 5), "kind": torch.full((3,), 2)}, r"0\.\.1, got 2\.\.2"),
    ],
)
def test_refuses_what_does_not_fit_the_windows(added, message, generator, unchecked):
    with pytest.raises(ValueError, match=message):
        operation(*tensors(generator), choose(generator, 3, 5), **added)
