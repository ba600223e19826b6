"""Blocks that compute some of their windows, against the host's own, windows masked afterwards."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from windowed import (
    MAKERS,
    copies_of,
    falling,
    gathering,
    images,
    interception,
    plan_of,
    prunable,
    pruned,
    randomised,
    session,
    windowed,
)

import accel
from accel.errors import PlanError
from accel.pipelines.window_blocks import kept_windows
from accel.pipelines.window_stage import SIZES
from accel.schedule import Schedule
from accel.window_keeps import SCORES, kept_of
from accel.window_ranking import ranked, token_energy

ROOT = Path(__file__).parents[2]
SLOW = (pytest.mark.slow, pytest.mark.timeout(900))
ODD = (72, 52)  # 18 x 13 patches, which nothing divides


CASES = [(name, None) for name in MAKERS]
CASES += [(name, ODD) for name in ("swin any size", "swinv2 any size", "sam")]
# 18 x 13 patches too, of which Cr cuts off what makes no patch; of SAM 2 the first windows divide
CASES += [("swinv2 cr any size", (74, 55)), ("hieradet", (64, 160))]


def outputs(model, x):
    """Logits and the map behind every stage or block."""
    with torch.no_grad():
        return [model(x), *model.forward_intermediates(x, intermediates_only=True)]


def near(found, expected, most=1e-6):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= most * b.abs().max()


class Reference:
    """The host's whole block on every window, and of its result the kept windows alone.

    A window depends on no other one inside a block, so that this is pruning, at full price.
    """

    def __init__(self, model, keeps, score):
        self.model, self.keeps, self.score, self.stage_maps = model, keeps, score, {}
        for stage in interception(model).stages:
            blocks = [b for b in stage.blocks if b.host.obstacle is None]
            for block in blocks:
                block.module.forward = self.forward(block, stage)

    def forward(self, block, stage):
        own = block.own

        def forward(x):
            cut = block.host.cut(x)
            kept = kept_of(self.keeps[block.site], cut.windows)
            if kept == cut.windows:
                return own(x)
            first = next(
                b for b in stage.blocks if kept_of(self.keeps[b.site], cut.windows) < cut.windows
            )
            if block is first:
                self.stage_maps[stage] = token_energy(x.detach().flatten(1, -2), self.score)
            table = cut.table()
            best = ranked(self.stage_maps[stage], table, kept)
            keep = torch.zeros(len(x), cut.tokens + 1, dtype=torch.bool)
            for one, windows in zip(keep, best, strict=True):
                one[table[windows].flatten()] = True
            keep = keep[:, :-1].reshape(x.shape[:-1])[..., None]
            return torch.where(keep, own(x), x)

        return forward


def reference(name, keeps, score="norm_of_means", **changes):
    model = windowed(name, **changes)
    if not isinstance(keeps, dict):
        keeps = dict.fromkeys(prunable(model), keeps)
    pruned(model, {})
    Reference(model, keeps, score)
    return model


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_gathering_all_windows_is_the_host(name, size):
    x, model = images(name, size=size), windowed(name)
    expected = outputs(model, x)
    near(outputs(gathering(model), x), expected)


REAL = [
    *(("swin_tiny_patch4_window7_224", s) for s in ((224, 224), (200, 248))),
    *(("swin_small_patch4_window7_224", s) for s in ((224, 224), (200, 248))),
    *(("swinv2_tiny_window8_256", s) for s in ((256, 256), (200, 248))),
    *(("swinv2_small_window8_256", s) for s in ((256, 256), (200, 248))),
    *(("swinv2_tiny_window16_256", s) for s in ((256, 256), (200, 248))),
    *(("swinv2_small_window16_256", s) for s in ((256, 256), (200, 248))),
    *(("swin_s3_tiny_224", s) for s in ((224, 224), (200, 248))),
    *(("swin_s3_small_224", s) for s in ((224, 224), (200, 248))),
    *(("swinv2_cr_tiny_224", s) for s in ((224, 224), (203, 250))),
    ("swinv2_cr_tiny_ns_224", (200, 248)),
    *(("sam2_hiera_tiny", s) for s in ((224, 224), (224, 288))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), REAL, ids=str)
def test_gathering_all_windows_is_the_host_of_every_architecture(name, size):
    """Logits and taps, at a size that windows do not divide too."""
    torch.manual_seed(3)
    more = {"strict_img_size": False} if "swin" in name and size[0] != size[1] else {}
    model = randomised(timm.create_model(name, **more).eval(), std=0.05)
    x = torch.randn(1, 3, *size)
    expected = outputs(model, x)
    near(outputs(gathering(model), x), expected)


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_keep_one_is_bit_for_bit_the_host_and_so_is_what_is_disabled(name, size):
    x, model = images(name, size=size), windowed(name)
    expected, names = outputs(model, x), list(model.state_dict())
    for keep in (1.0, 0.5):
        pruned(model, keep)
        assert list(model.state_dict()) == names
        found = outputs(model, x)
        same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert all(same) if keep == 1 else not same[0]
    accel.disable(model)
    assert all(map(torch.equal, outputs(model, x), expected))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_is_the_hosts_blocks_on_kept_windows(name, size, score):
    x, model = images(name, size=size), windowed(name)
    keeps = falling(model)
    expected = outputs(reference(name, keeps, score), x)
    near(outputs(pruned(model, keeps, score), x), expected, 3e-6)


def test_every_image_has_its_own_windows():
    x, model = images("swin"), pruned(windowed("swin"), 0.5)
    together = outputs(model, x)[0]
    kept = kept_windows(session(model))["layers.0"]
    alone = torch.cat([outputs(model, one[None])[0] for one in x])
    assert not torch.equal(kept[0], kept[1])
    near([together], [alone], 2e-6)


def test_kept_windows_are_told_for_the_last_call():
    model = pruned(windowed("swin"), 0.5)
    assert kept_windows(session(model)) == {}
    model(images("swin"))
    found = kept_windows(session(model))
    assert {stage: tuple(kept.shape) for stage, kept in found.items()} == {
        "layers.0": (3, 4, 5),
        "layers.1": (3, 2, 3),
        "layers.2": (3, 1, 2),
    }
    assert [int(kept[0].sum()) for kept in found.values()] == [10, 3, 1]
    pruned(model, {})
    model(images("swin"))
    assert kept_windows(session(model)) == {}


def test_the_summary_has_what_every_block_keeps():
    model = pruned(windowed("swin"), 0.5)
    with torch.no_grad():
        model(images("swin"))
        rows = {row.site: row for row in accel.summary(model).rows}
    assert len(rows) == 8
    first, last = rows["layers.0.blocks.0.attn"], rows["layers.1.blocks.3.attn"]
    assert (first.keep, last.keep, first.kernels) == (0.5, 0.5, ("windows",))
    assert first.call_ms > 0
    pruned(model, {})
    model(images("swin"))
    row = accel.summary(model).rows[0]
    assert (row.keep, row.kernels) == (1.0, ("host",))


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_the_summary_counts_the_windows_that_blocks_meet(name, size):
    x, model, met = images(name, size=size), pruned(windowed(name), 0.5), {}
    for block in (b for stage in interception(model).stages for b in stage.blocks):
        if block.host.obstacle is None:
            block.module.register_forward_pre_hook(
                lambda module, args, b=block: met.update({b.site: b.host.cut(args[0]).windows})
            )
    with torch.no_grad():
        model(x)
    found = {row.site: row.keep for row in accel.summary(model).rows}
    assert len(met) > 1
    assert met.keys() <= found.keys()
    expected = {site: kept_of(0.5, n) / n for site, n in met.items()}
    assert found == {**dict.fromkeys(found, 1.0), **expected}


def test_blocks_behind_one_that_stands_alone_have_a_name_of_their_own():
    model = pruned(windowed("swinv2 cr"), 0.5)
    model(images("swinv2 cr"))
    names = ["stages.0", "stages.1", "stages.1.blocks.3", "stages.2"]
    assert [*kept_windows(session(model))] == names


@pytest.mark.parametrize("name", ["swin", "swinv2", "swinv2 cr", "sam", "hiera", "hieradet"])
def test_features_alone(name):
    """Every tap of the wrapper that timm makes; the last one is behind the last stage."""
    x, model = images(name), windowed(name)
    expected = outputs(pruned(model, 0.5), x)[1:]
    taps = windowed(
        name, features_only=True, feature_cls="getter", out_indices=range(len(expected))
    )
    taps.model.load_state_dict(model.state_dict(), strict=False)
    accel.enable(taps, plan_of(taps.model, 0.5))
    with torch.no_grad():
        near(taps(x), expected)
    assert kept_windows(session(taps.model))


@pytest.mark.parametrize(
    "name", ["swin", "swinv2 any size", "swinv2 cr any size", "sam", "hiera", "hieradet"]
)
def test_gradients_are_those_of_masked_blocks(name):
    x, grads = images(name), []
    model = windowed(name)
    keeps = falling(model)
    for one in (reference(name, keeps), pruned(model, keeps)):
        inputs = x.clone().requires_grad_()
        one(inputs).square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in one.parameters())])
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            # of a bias that every key has, which softmax takes away, rounding is all there is
            torch.testing.assert_close(
                found, expected, atol=1e-4 * float(expected.abs().max() + 1e-2), rtol=1e-3
            )


@pytest.mark.parametrize("name", ["swin", "swinv2", "swinv2 cr", "sam", "hiera", "hieradet"])
def test_checkpointing_computes_the_same_windows_again(name):
    """Two calls wait for their gradients at once, and blocks are computed again from the last."""
    grads = []
    for again in (False, True):
        model = windowed(name)
        pruned(model, falling(model))
        model.set_grad_checkpointing(again)
        out = sum(model(images(name, seed=seed)).square().sum() for seed in (1, 2))
        out.backward()
        grads.append([p.grad for p in model.parameters()])
        for stage in interception(model).stages:
            assert stage._now.get() is None
    assert all(a is b or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_stochastic_depth_and_dropout_train():
    model = pruned(windowed("swin", drop_path_rate=0.5, proj_drop_rate=0.1), 0.5).train()
    model(images("swin")).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "cast"])
def test_low_precision(dtype, cast):
    x, model = images("swin"), windowed("swin")
    expected = outputs(pruned(model, 0.5), x)[0]
    if cast:
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=not cast):
        found = outputs(model, x)[0]
    assert (found.float() - expected).abs().max() < 0.2 * expected.abs().max()


COMPILED = ("swin any size", "swinv2 any size", "swinv2 cr", "sam", "hiera", "hieradet")


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["swin"], 2),
        pytest.param([*COMPILED], 12, marks=SLOW),
    ],
    ids=["one", "all"],
)
def test_compiles_whole_and_once(names, count):
    """In a process of its own, without checked shapes: a compiler cannot look into the checks."""
    command = [sys.executable, Path(__file__).with_name("compile_windows.py"), *names]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"{count} compiled"


def test_copies_and_pickles_are_plain():
    x, model = images("swin"), windowed("swin")
    expected = outputs(model, x)
    pruned(model, 0.5)
    model(x)
    for other in copies_of(model):
        assert all(map(torch.equal, outputs(other, x), expected))


def test_two_threads_with_a_model_each():
    models = [pruned(windowed("swin"), keep) for keep in (0.3, 0.6)]
    x = images("swin")
    alone = [outputs(model, x)[0] for model in models]
    found = {}

    def work(number):
        found[number] = [outputs(models[number], x)[0] for _ in range(4)]

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[n], out) for n, outs in found.items() for out in outs)


def test_an_interrupted_call_leaves_nothing_to_the_next():
    x, model = images("swin"), pruned(windowed("swin"), 0.5)
    expected = outputs(model, x)[0]

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.layers[1].blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(images("swin", seed=5))
    hook.remove()
    assert torch.equal(outputs(model, x)[0], expected)


def test_inference_mode_first_and_gradients_after():
    x, model = images("swin any size", size=ODD), pruned(windowed("swin any size"), 0.5)
    with torch.inference_mode():
        expected = model(x).clone()
    out = model(x)
    out.sum().backward()
    near([out.detach()], [expected])


def test_another_plan_serves_the_same_model():
    x, model = images("swin"), windowed("swin")
    once = outputs(pruned(model, 0.5), x)[0]
    other = outputs(pruned(model, 0.25), x)[0]
    assert not torch.equal(once, other)
    assert torch.equal(outputs(pruned(model, 0.5), x)[0], once)


@pytest.mark.parametrize(
    ("name", "keeps", "message"),
    [
        (
            "swin",
            {"layers.1.blocks.0.attn": 0.3, "layers.1.blocks.2.attn": 0.5},
            r"layers\.1\.blocks\.2\.attn'\] is 0\.5, more than the 0\.3 of 'layers\.1\.blocks\.0",
        ),
        ("swin", {"layers.1.blocks.0.attn": 0.3}, "keeps do not grow"),
        ("sam", {"blocks.2.attn": 0.5}, "'blocks.2.attn'.* attends to the whole map"),
        ("hiera", {"blocks.3.attn": 0.5}, "'blocks.3.attn'.* begins a stage"),
        ("hiera", {"blocks.7.attn": 0.5}, "'blocks.7.attn'.* attends to the whole map"),
        ("hieradet", {"blocks.2.attn": 0.5}, "'blocks.2.attn'.* begins a stage"),
        ("hieradet", {"blocks.6.attn": 0.5}, "'blocks.6.attn'.* attends to the whole map"),
        ("swinv2 cr", {"stages.1.blocks.2.attn": 0.5}, r"blocks\.2\.attn'.* norms its whole map"),
    ],
)
def test_plans_that_do_not_fit_are_refused(name, keeps, message):
    model = windowed(name)
    with pytest.raises(PlanError, match=message):
        pruned(model, keeps)
    assert not hasattr(model, "_accel")
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_plan_that_does_not_fit_leaves_the_one_before_it():
    x, model = images("swin"), pruned(windowed("swin"), 0.5)
    expected = outputs(model, x)[0]
    with pytest.raises(PlanError):
        pruned(model, {"layers.1.blocks.0.attn": 0.3})
    assert torch.equal(outputs(model, x)[0], expected)


def test_sparse_attention_is_refused():
    model = windowed("swin")
    with pytest.raises(PlanError, match="for which a SwinTransformer has no use"):
        accel.enable(model, "window")
    with pytest.raises(PlanError, match="for which a SwinTransformer has no use"):
        accel.enable(model, replace(plan_of(model, 0.5), dense="kernel"))


@pytest.mark.parametrize("disabled", [True, False], ids=["disabled", "dropped"])
def test_a_model_is_freed_that_nobody_holds(disabled):
    model = pruned(windowed("swin"), 0.5)
    model(images("swin"))
    if disabled:
        accel.disable(model)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_stage_called_twice_with_one_map_ranks_the_same_windows():
    """With gradients too, where a ranking is looked for that a checkpoint runs again."""
    model = pruned(windowed("swin"), 0.5)
    entered = model.patch_embed(images("swin"))
    first = model.layers(entered)
    assert torch.equal(model.layers(entered), first)
    with torch.no_grad():
        assert torch.equal(model.layers(entered), first)


def test_tables_of_a_few_sizes_are_kept():
    model = pruned(windowed("swin any size"), 0.5)
    with torch.no_grad():
        for rows in range(2, 16):
            model(images("swin", batch=1, size=(16 * rows, 48)))
    for stage in interception(model).stages:
        assert len(stage._tables) == len(stage._masks) == SIZES


@pytest.mark.parametrize("share", ["dense_start", "dense_end"])
def test_a_schedule_that_would_be_dense_is_refused(share):
    model = windowed("swin")
    schedule = {"dense_start": 0.0, share: 0.3}
    plan = replace(plan_of(model, 0.5), schedule=Schedule(**schedule))
    with pytest.raises(PlanError, match=rf"{share} 0\.3, but one call .* give {share} 0"):
        accel.enable(model, plan)
    x = images("swin")
    dense = accel.enable(model, replace(plan, schedule=Schedule(dense_start=1.0)))
    assert torch.equal(dense(x), windowed("swin")(x))
