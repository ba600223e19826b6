"""Compiles pruned models: whole, once, with the results, gradients and windows of eager ones."""

import sys
import warnings

import torch
import torch._dynamo.testing
from windowed import falling, images, net_of, plan_of, pruned, session, windowed

import accel
from accel.pipelines.window_blocks import kept_windows

LIKE_OTHERS = ("swinv2 cr", "hieradet")  # Swin v2 and SAM, of which gradients are compiled


def near(found, expected, most=2e-6):
    assert (found - expected).abs().max() <= most * expected.abs().max()


def gradients(model, x, call):
    model.zero_grad()
    call(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def whole(name, grad):
    model = windowed(name)
    keeps = falling(model)
    pruned(model, keeps)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in (1, 2, 1):
        x = images(name, seed=seed)
        with torch.set_grad_enabled(grad):
            expected = model(x)
            kept = kept_windows(session(model))
            near(compiled(x), expected)
        found = kept_windows(session(model))
        assert found
        assert all(torch.equal(windows, kept[stage]) for stage, windows in found.items())
        if grad:
            for a, b in zip(gradients(model, x, compiled), gradients(model, x, model), strict=True):
                near(a, b, 1e-4)
    assert counter.frame_count == 1, counter.frame_count
    rows = {row.site: row.keep for row in accel.summary(model).rows}
    assert min(rows.values()) < 1
    assert set(rows) >= set(keeps)


def checkpointed():
    """The graph breaks at the checkpoints; blocks are computed again on the same windows."""
    model, x = windowed("swin"), images("swin")
    pruned(model, falling(model))
    expected = gradients(model, x, model)
    model.set_grad_checkpointing()
    torch._dynamo.reset()
    found = gradients(model, x, torch.compile(model, backend="aot_eager"))
    for a, b in zip(found, expected, strict=True):
        near(a, b, 1e-4)


def taken_apart():
    """A net of features, whole and once; then with the checkpoints that it puts around stages."""
    net, x = net_of("swin"), images("swin")
    accel.enable(net, plan_of(net, 0.5))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2):
            x = images("swin", seed=seed)
            for found, expected in zip(compiled(x), net(x), strict=True):
                near(found, expected)
    assert counter.frame_count == 1, counter.frame_count
    expected = gradients(net, x, lambda x: net(x)[-1])
    net.set_grad_checkpointing()
    torch._dynamo.reset()
    again = torch.compile(net, backend="aot_eager")
    for a, b in zip(gradients(net, x, lambda x: again(x)[-1]), expected, strict=True):
        near(a, b, 1e-4)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = 0
    names = sys.argv[1:]
    for name in names:
        for grad in (False, True) if len(names) > 1 else (True,):
            if grad and name in LIKE_OTHERS:
                continue
            whole(name, grad)
            done += 1
    checkpointed()
    if len(names) > 1:
        taken_apart()
        done += 1
    print(f"{done + 1} compiled")
