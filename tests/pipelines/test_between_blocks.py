"""What blocks hand on: in checkpoints of several blocks, in several threads, to nobody else."""

import sys
import threading

import pytest
import tiny_vit
import torch
import windowed
from timm.models._manipulate import checkpoint_seq
from torch.nn import Sequential

from accel.pipelines.between_blocks import Entered, HandedOn

FALLING = (0.9, 0.8, 0.7, 0.6)
STEPS = 6  # of a training: memory that one lets go is what the next one gets


def test_a_tensor_is_known_until_it_is_let_go_or_written_to():
    entered, x = Entered(), torch.zeros(6, 4)
    entered.put(x, "first", 0)
    entered.put(x, "second", 1)
    entered.put(x[2:], "rows")
    assert entered.find(x, 0) == entered.find(x.detach(), 0) == "first"
    assert entered.find(x, 1) == "second"
    assert entered.find(x[2:]) == "rows"
    assert entered.find(x) is entered.find(torch.zeros(6, 4), 0) is None
    x += 1
    assert entered.find(x, 0) is None
    del x
    entered.put(torch.zeros(3), "other")
    assert len(entered._known) == 1


def test_what_is_handed_on_stays_in_its_thread_and_pass():
    handed, seen = HandedOn(), []
    handed.put("of the call")
    thread = threading.Thread(target=lambda: seen.append(handed.get()))
    thread.start()
    thread.join()
    x = torch.ones(3, requires_grad=True)
    y = x.sin()

    def inside(grad):
        seen.append(handed.get())
        handed.put("of the pass")
        seen.append(handed.get())

    y.register_hook(inside)
    y.sum().backward()
    assert seen == [None, None, "of the pass"]
    assert handed.get() is None


def gradients_of_steps(run, weights):
    """Of each of a few steps of training with other images."""
    found = []
    for seed in range(STEPS):
        for weight in weights:
            weight.grad = None
        run(seed).square().sum().backward()
        found.append([w.grad.clone() for w in weights if w.grad is not None])
    return found


def assert_same(found, expected, what):
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(one, other, strict=True):
            least = 1e-4 * float(b.abs().max() + 1e-3)
            message = f"{what}, step {step}: {(a - b).abs().max()}"
            assert torch.allclose(a, b, atol=least, rtol=1e-3), message


@pytest.mark.parametrize("how", [tiny_vit.MERGE, tiny_vit.CLASS], ids=str)
def test_checkpoints_of_several_blocks_know_their_tokens(how):
    model = tiny_vit.build()
    tiny_vit.enable(model, FALLING, **how)

    def run(every, seed):
        x = model._pos_embed(model.patch_embed(tiny_vit.images(model, seed=seed)))
        return model.norm(
            checkpoint_seq(model.blocks, x, every=every) if every else model.blocks(x)
        )

    weights = [*model.blocks.parameters()]
    expected = gradients_of_steps(lambda seed: run(0, seed), weights)
    for every in (1, 2, 3):
        found = gradients_of_steps(lambda seed, every=every: run(every, seed), weights)
        assert_same(found, expected, f"every {every}")


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_checkpoints_of_several_blocks_know_their_windows(name):
    model = windowed.windowed(name)
    windowed.pruned(model, windowed.falling(model))
    (stage,) = (layer for layer in model.layers if len(layer.blocks) == 4)
    seen = []
    stage.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for seed in range(STEPS):
            model(windowed.images(name, seed=seed))

    def run(every, seed):
        x = stage.downsample(seen[seed].clone().requires_grad_())
        blocks = [*stage.blocks]  # of Swin v2 they are a ModuleList
        return checkpoint_seq(blocks, x, every=every) if every else Sequential(*blocks)(x)

    weights = [*stage.parameters()]
    expected = gradients_of_steps(lambda seed: run(0, seed), weights)
    for every in (1, 2, 3, 4):
        found = gradients_of_steps(lambda seed, every=every: run(every, seed), weights)
        assert_same(found, expected, f"every {every}")
    # a block that is called by itself ranks its own tokens, whatever a backward pass left
    x = stage.downsample(seen[0])
    alone = stage.blocks[2](x)
    assert torch.equal(alone, stage.blocks[2](x))


def merging():
    model = tiny_vit.build()
    tiny_vit.enable(model, FALLING, **tiny_vit.MERGE)
    return model, [tiny_vit.images(model, seed=seed) for seed in range(8)]


def pruning():
    model = windowed.pruned(windowed.windowed("swin"), 0.5)
    return model, [windowed.images("swin", seed=seed) for seed in range(8)]


@pytest.mark.parametrize("made", [merging, pruning], ids=lambda made: made.__name__)
@torch.no_grad()
def test_calls_of_several_threads_do_not_meet(made):
    model, asked = made()
    expected = [model(x) for x in asked]
    wrong = []

    @torch.no_grad()
    def work(first):
        try:
            for number in [*range(first, 8), *range(first)] * 4:
                if not torch.equal(model(asked[number]), expected[number]):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
