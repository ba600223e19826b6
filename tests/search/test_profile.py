"""Errors of candidates: against the kernels' own outputs, through the output projection."""

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.context import Where
from accel.estimators import BlockMassTopK
from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.layout import Layout
from accel.pattern import Full, Window
from accel.profile import Profile
from accel.router import Run
from accel.schedule import Phase, Schedule
from accel.search.profile import Calibrator

GRID, HEADS, DIM, BLOCK = (3, 5, 7), 3, 16, (32, 16)
LAYOUT = Layout.of(GRID)
SITE = Site("blocks.0.attn1", HEADS, DIM)
SCHEDULE = Schedule(dense_start=0.25, bands=(0.5,))
CANDIDATES = (
    Choice(Full()),
    Choice(Window(1, 1, 2)),
    Choice(BlockMassTopK(keep=0.4), order="hwt"),
    Choice(BlockMassTopK(keep=0.4), order="hwt", rest="mean"),
    Choice(BlockMassTopK(keep=0.4), order="hwt", rest="taylor"),
    Choice(Window(0, 2, 2), order="hwt", rest="taylor"),
)


def tensors(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, HEADS, LAYOUT.length, DIM, generator=generator) * 1.5 for _ in range(3)
    )
    weight = torch.randn(11, HEADS * DIM, generator=generator)
    return q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v), weight


def run_at(step: int, total: int = 8, branch: str = "cond") -> Run:
    return Run(Where(step, total, branch), LAYOUT, SCHEDULE.phase(step, total))


def calibrator_of(profile: Profile, weight: torch.Tensor, **settings) -> Calibrator:
    return Calibrator(
        profile,
        SCHEDULE,
        BLOCK,
        (1.0, 0.5, 0.3, 0.35, 0.36, 0.2),
        {SITE.name: weight},
        rows=LAYOUT.length,
        **settings,
    )


def test_errors_are_those_of_the_kernels_outputs():
    q, k, v, out, weight = tensors()
    profile = Profile(CANDIDATES)
    calibrator_of(profile, weight)(SITE, run_at(2), q, k, v, out)
    errors = profile.errors[SITE.name, 0]
    w = weight.unflatten(1, (HEADS, DIM))
    whole = torch.einsum("hrd,fhd->rf", out[0], w).square().sum()
    for choice, found in zip(CANDIDATES, errors, strict=True):
        blocking = Blocking(LAYOUT, choice.order, BLOCK)
        if choice.online:
            keep = choice.select.select(q, k, v, blocking=blocking).keep
        else:
            keep = choice.select.mask(blocking, q.device).expand(HEADS, -1, -1)
        mask = BlockMask.from_dense(
            keep, block=BLOCK, q_length=LAYOUT.length, kv_length=LAYOUT.length
        )
        sparse = sparse_attention(
            q, k, v, mask, rest=choice.rest, order=blocking.indices(), backend="reference"
        )
        wrong = torch.einsum("hrd,fhd->hrf", (sparse - out)[0], w)
        expected = wrong.square().sum((1, 2)) / whole
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_calibration_goes_on_with_the_provisional_choice():
    q, k, v, out, weight = tensors(1)
    strict = calibrator_of(Profile(CANDIDATES), weight, tolerance=1e-9)
    close = strict(SITE, run_at(2), q, k, v, out)
    torch.testing.assert_close(close, out, rtol=1e-4, atol=1e-5)  # only Full is that harmless
    loose = calibrator_of(Profile(CANDIDATES), weight, tolerance=1e9)
    assert not torch.allclose(loose(SITE, run_at(2), q, k, v, out), out, atol=1e-3)


def test_bands_and_branches_are_measured_at_their_first_and_last_step():
    q, k, v, out, weight = tensors(2)
    profile, calls = Profile(CANDIDATES), []
    calibrator = calibrator_of(profile, weight, progress=lambda: calls.append(None))
    for step in range(8):
        for branch in ("cond", "uncond"):
            result = calibrator(SITE, run_at(step, branch=branch), q, k, v, out)
            if step < 2:
                assert result is out
    assert set(profile.errors) == {(SITE.name, 0), (SITE.name, 1)}
    assert profile.counts == {(SITE.name, 0): 4, (SITE.name, 1): 4}
    assert len(calls) == 8


def test_an_unknown_place_is_left_alone():
    q, k, v, out, weight = tensors(3)
    profile = Profile(CANDIDATES)
    calibrator = calibrator_of(profile, weight)
    assert calibrator(SITE, Run(None, LAYOUT, Phase(0, 0)), q, k, v, out) is out
    assert not profile.errors


def test_profiles_survive_a_file():
    profile = Profile(CANDIDATES)
    profile.add(("a", 0), torch.rand(4, 3))
    profile.add(("a", 0), torch.rand(4, 3))
    back = Profile.from_dict(profile.to_dict())
    assert back.candidates == CANDIDATES
    assert back.counts == profile.counts
    torch.testing.assert_close(back.errors["a", 0], profile.errors["a", 0])


@pytest.mark.parametrize("values", [(1.0, 3.0), (2.0, 2.0, 5.0)])
def test_errors_are_means(values):
    profile = Profile(CANDIDATES)
    for value in values:
        profile.add(("a", 0), torch.full((4, 2), value))
    torch.testing.assert_close(
        profile.errors["a", 0], torch.full((4, 2), sum(values) / len(values))
    )
