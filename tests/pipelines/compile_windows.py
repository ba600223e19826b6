"""Compiles pruned models: whole, once, with the results, gradients and windows of eager ones."""

import sys
import warnings

import torch
import torch._dynamo.testing
from windowed import falling, images, pruned, session, windowed

import accel
from accel.pipelines.window_blocks import kept_windows


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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = 0
    names = sys.argv[1:]
    for name in names:
        for grad in (False, True) if len(names) > 1 else (True,):
            whole(name, grad)
            done += 1
    checkpointed()
    print(f"{done + 1} compiled")
