"""What a calibrator measures, against the kernels' own outputs, and with what a run goes on."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from accel.blocking import Blocking
from accel.choice import DENSE, Alternatives, Choice
from accel.context import Where
from accel.errors import PlanError
from accel.estimators import Antidiagonal, BlockMassTopK
from accel.geometry import Site
from accel.kernels.attention import sparse_attention
from accel.kernels.block_mask import BlockMask
from accel.kernels.reference import block_mass_reference
from accel.layout import Layout
from accel.pattern import Full, Identity, Share, Skip, Window
from accel.pipelines.calibrator import Calibrator, cheapest_harmless, observed_steps
from accel.pipelines.mass_observer import MassObserver
from accel.profile import Profile
from accel.recipes import Demand
from accel.router import Run
from accel.schedule import Phase, Schedule

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, (32, 16)
LAYOUT = Layout.of((3, 5, 7), text_before=6, padding=4)
VALID = LAYOUT.valid_length
SITE = Site("blocks.0.attn1", HEADS, DIM)
SCHEDULE = Schedule(dense_start=0.25, bands=(0.5,))
MASS = BlockMassTopK(keep=0.4)
BLOCKS = (
    Choice(Full()),
    Choice(Window(1, 1, 2)),
    Choice(MASS, order="hwt"),
    Choice(MASS, order="hwt", rest="mean"),
    Choice(MASS, order="hwt", rest="taylor"),
    Choice(Window(0, 2, 2), order="hwt", rest="taylor"),
    Choice(Antidiagonal(tau=0.6)),
    Choice(Skip()),
)
TAKEN_OVER = (Choice(Identity()), Choice(Share("step")), Choice(Share("branch")))


def tensors(seed: int = 0, batch: int = 1):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, LAYOUT.length, DIM, generator=generator) * 1.5
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v, dense(q, k, v)


def dense(q, k, v):
    valid = torch.arange(LAYOUT.length) < VALID
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=valid.expand(LAYOUT.length, -1))


WEIGHT = torch.randn(11, HEADS * DIM, generator=torch.Generator().manual_seed(9))


def run_at(step: int, total: int = 8, branch: str = "cond", schedule=SCHEDULE) -> Run:
    where = Where(step, total, branch)
    return Run(where, LAYOUT, branch=branch, phase=schedule.phase(step, total))


def demand_of(candidates=BLOCKS, schedule=SCHEDULE, **asked) -> Demand:
    return Demand(candidates, schedule, BLOCK, **asked)


def calibrator_of(demand=None, **settings) -> Calibrator:
    demand = demand_of() if demand is None else demand
    profile = Profile(demand.candidates, demand.orders, demand.precisions)
    return Calibrator(profile, demand, {SITE.name: WEIGHT}, rows=VALID, **settings)


def errors_of(found, out):
    """Through the projection, and of the heads alone, of outputs [batch, heads, tokens, dim]."""
    found, out = found[0, :, :VALID], out[0, :, :VALID]
    w = WEIGHT.unflatten(1, (HEADS, DIM))
    whole = torch.einsum("hrd,fhd->rf", out, w).square().sum()
    wrong = torch.einsum("hrd,fhd->hrf", found - out, w)
    spread = (out - out.mean(1, keepdim=True)).square().sum((1, 2))
    return wrong.square().sum((1, 2)) / whole, (found - out).square().sum((1, 2)) / spread


def applied(choice, q, k, v):
    """The kernel's output, and the kept blocks [heads, q_blocks, kv_blocks]."""
    blocking = Blocking(LAYOUT, choice.order, BLOCK)
    if choice.online:
        keep = choice.select.select(q, k, v, blocking=blocking).keep
    else:
        keep = choice.select.mask(blocking, q.device).expand(1, HEADS, -1, -1)
    mask = BlockMask.from_dense(keep, block=BLOCK, q_length=q.shape[2], kv_length=q.shape[2])
    out = sparse_attention(
        q,
        k,
        v,
        mask,
        rest=choice.rest,
        order=blocking.indices(),
        kv_length=VALID,
        backend="reference",
    )
    return out, keep[0]


def test_errors_and_keeps_are_those_of_the_kernels_outputs():
    q, k, v, out = tensors()
    calibrator = calibrator_of()
    calibrator(SITE, run_at(2), q, k, v, out)
    profile, key = calibrator.profile, (SITE.name, 0)
    for i, choice in enumerate(BLOCKS):
        found, keep = applied(choice, q, k, v)
        errors, head_errors = errors_of(found.float(), out)
        torch.testing.assert_close(profile.errors[key][i], errors, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(profile.head_errors[key][i], head_errors, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(profile.keeps[key][i], keep.float().mean((1, 2)))
    assert profile.layout == LAYOUT
    assert torch.allclose(profile.recalls[key][0], torch.ones(HEADS))
    assert (profile.recalls[key][7] == 0).all()
    # taylor and mean keep the same blocks as drop
    assert torch.equal(profile.recalls[key][2], profile.recalls[key][4])


def test_a_batch_is_measured_by_its_first_element():
    calibrators = [calibrator_of(), calibrator_of()]
    q, k, v, out = tensors(batch=3)
    calibrators[0](SITE, run_at(2), q, k, v, out)
    calibrators[1](SITE, run_at(2), q[:1], k[:1], v[:1], out[:1])
    one, other = (c.profile.errors[SITE.name, 0] for c in calibrators)
    torch.testing.assert_close(one, other)


def test_a_selection_is_measured_again_where_it_is_stale():
    calibrator = calibrator_of()
    first, last = tensors(0), tensors(1)
    calibrator(SITE, run_at(2), *first)
    fresh = calibrator.profile.errors[SITE.name, 0][2].clone()
    calibrator(SITE, run_at(3), *last)
    stale = 2 * calibrator.profile.errors[SITE.name, 0][2] - fresh
    q, k, v, out = last
    blocking = Blocking(LAYOUT, "hwt", BLOCK)
    keep = MASS.select(*first[:3], blocking=blocking).keep
    mask = BlockMask.from_dense(keep, block=BLOCK, q_length=q.shape[2], kv_length=q.shape[2])
    found = sparse_attention(q, k, v, mask, order=blocking.indices(), kv_length=VALID)
    torch.testing.assert_close(stale, errors_of(found, out)[0], rtol=1e-3, atol=1e-5)


class TestTakenOver:
    def test_identity_is_the_value_of_the_same_token(self):
        q, k, v, out = tensors()
        calibrator = calibrator_of(demand_of(TAKEN_OVER))
        calibrator(SITE, run_at(2), q, k, v, out)
        profile, key = calibrator.profile, (SITE.name, 0)
        expected = errors_of(v.repeat_interleave(2, 1), out)[0]
        torch.testing.assert_close(profile.errors[key][0], expected, rtol=1e-4, atol=1e-6)
        assert (profile.keeps[key][0] == 0).all()

    def test_share_takes_the_output_of_the_step_before_the_band(self):
        calibrator = calibrator_of(demand_of(TAKEN_OVER))
        calls = {step: tensors(step) for step in range(8)}
        for step, call in calls.items():
            calibrator(SITE, run_at(step), *call)
        for band, before, steps in ((0, 1, (2, 3)), (1, 3, (4, 7))):
            expected = [errors_of(calls[before][3], calls[step][3])[0] for step in steps]
            found = calibrator.profile.errors[SITE.name, band][1]
            torch.testing.assert_close(found, sum(expected) / 2, rtol=1e-4, atol=1e-6)
            assert (calibrator.profile.keeps[SITE.name, band][1] == 0).all()

    def test_where_there_is_no_step_before_the_first_is_computed_and_kept(self):
        schedule = Schedule(dense_start=0.0)
        calibrator = calibrator_of(demand_of(TAKEN_OVER, schedule))
        calls = [tensors(step) for step in range(3)]
        for step, call in enumerate(calls):
            calibrator(SITE, run_at(step, 3, schedule=schedule), *call)
        expected = errors_of(calls[0][3], calls[2][3])[0]
        profile = calibrator.profile
        torch.testing.assert_close(profile.errors[SITE.name, 0][1], expected / 2)
        assert (profile.keeps[SITE.name, 0][1] == 0.5).all()

    def test_share_takes_the_output_of_the_first_branch(self):
        calibrator = calibrator_of(demand_of(TAKEN_OVER))
        one, other = tensors(0), tensors(1)
        calibrator(SITE, run_at(2, branch="cond"), *one)
        calibrator(SITE, run_at(2, branch="uncond"), *other)
        expected = errors_of(one[3], other[3])[0]
        profile, key = calibrator.profile, (SITE.name, 0)
        # in the first branch it is dense
        torch.testing.assert_close(profile.errors[key][2], expected / 2, rtol=1e-4, atol=1e-6)
        assert (profile.keeps[key][2] == 0.5).all()
        assert (profile.recalls[key][2] == 0.5).all()


class TestProgressive:
    def test_without_a_tolerance_the_run_goes_on_dense(self):
        calibrator = calibrator_of(demand_of(BLOCKS[1:]))
        q, k, v, out = tensors(1)
        for step in range(2, 8):
            assert calibrator(SITE, run_at(step), q, k, v, out) is out

    def test_with_one_it_goes_on_with_the_cheapest_harmless_candidate(self):
        q, k, v, out = tensors(1)
        calibrator = calibrator_of(demand_of(BLOCKS[:2], tolerance=1e9))
        found = calibrator(SITE, run_at(2), q, k, v, out)
        expected = applied(BLOCKS[1], q, k, v)[0].float()
        torch.testing.assert_close(
            found[:, :, :VALID], expected[:, :, :VALID], rtol=1e-4, atol=1e-4
        )
        dear = calibrator_of(demand_of(BLOCKS[:2], tolerance=1e9), prices=(0.5, 0.6))
        torch.testing.assert_close(dear(SITE, run_at(2), q, k, v, out), out)

    def test_where_none_is_harmless_it_is_dense(self):
        q, k, v, out = tensors(1)
        calibrator = calibrator_of(demand_of(BLOCKS[1:], tolerance=1e-9))
        assert calibrator(SITE, run_at(2), q, k, v, out) is out

    def test_outputs_that_are_taken_over_go_on_too(self):
        calls = [tensors(step, batch=3) for step in range(3)]
        calibrator = calibrator_of(demand_of(TAKEN_OVER[:1], tolerance=1e9))
        found = calibrator(SITE, run_at(2), *calls[2])
        assert torch.equal(found, calls[2][2].repeat_interleave(2, 1))
        calibrator = calibrator_of(demand_of(TAKEN_OVER[1:2], tolerance=1e9))
        for step, call in enumerate(calls):
            found = calibrator(SITE, run_at(step), *call)
        assert torch.equal(found, calls[1][3])
        assert torch.equal(calibrator(SITE, run_at(3), *calls[2]), calls[1][3])

    def test_later_bands_take_over_what_the_run_went_on_with(self):
        calls = [tensors(step) for step in range(5)]
        calibrator = calibrator_of(demand_of(TAKEN_OVER[1:2], tolerance=1e9))
        for step, call in enumerate(calls):
            found = calibrator(SITE, run_at(step), *call)
        assert torch.equal(found, calls[1][3])


def test_bands_and_branches_are_measured_at_their_first_and_last_step():
    call = tensors(2)
    steps = []
    calibrator = calibrator_of(progress=lambda: steps.append(None))
    for step in range(8):
        for branch in ("cond", "uncond"):
            result = calibrator(SITE, run_at(step, branch=branch), *call)
            if step < 2:
                assert result is call[3]
    assert set(calibrator.profile.errors) == {(SITE.name, 0), (SITE.name, 1)}
    assert calibrator.profile.counts == {(SITE.name, 0): 4, (SITE.name, 1): 4}
    assert len(steps) == 8


def test_the_first_branch_alone_may_count():
    one, other = tensors(0), tensors(1)
    demand = demand_of(BLOCKS[:2], tolerance=1e9)
    alone, first = calibrator_of(demand), calibrator_of(demand, branches="first")
    alone(SITE, run_at(2, branch="cond"), *one)
    first(SITE, run_at(2, branch="cond"), *one)
    found = first(SITE, run_at(2, branch="uncond"), *other)
    key = (SITE.name, 0)
    assert first.profile.counts == {key: 1}
    assert torch.equal(first.profile.errors[key], alone.profile.errors[key])
    expected = applied(BLOCKS[1], *other[:3])[0].float()  # goes on with what was chosen there
    torch.testing.assert_close(found[:, :, :VALID], expected[:, :, :VALID], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule(dense_start=0.2, bands=(0.5,)), {2, 4, 5, 9}),
        (Schedule(dense_start=0.2, bands=(0.5,), refresh=(0.7,)), {2, 4, 5, 6, 7, 9}),
        (Schedule(dense_start=0.1, dense_end=0.3), {1, 6}),
        (Schedule(dense_start=0.0, bands=(0.1,)), {0, 1, 9}),
        (Schedule(dense_start=1.0), set()),
    ],
)
def test_the_steps_that_are_observed(schedule, steps):
    assert observed_steps(schedule, 10) == steps


def test_a_refresh_point_inside_a_band_selects_anew():
    schedule = Schedule(dense_start=0.0, refresh=(0.5,))
    calibrator = calibrator_of(demand_of(BLOCKS[2:3], schedule))
    calls = [tensors(seed) for seed in (0, 0, 1, 1)]
    for step, call in enumerate(calls):
        calibrator(SITE, run_at(step, 4, schedule=schedule), *call)
    expected = [errors_of(applied(BLOCKS[2], *call[:3])[0].float(), call[3])[0] for call in calls]
    found = calibrator.profile.errors[SITE.name, 0][0]
    torch.testing.assert_close(found, sum(expected) / 4, rtol=1e-3, atol=1e-5)


def test_maps_and_precisions_are_measured_where_they_are_asked_for():
    q, k, v, out = tensors(3)
    calibrator = calibrator_of(demand_of((), orders=("thw", "wht"), precisions=("full", "half")))
    assert calibrator(SITE, run_at(2), q, k, v, out) is out
    profile, key = calibrator.profile, (SITE.name, 0)
    assert profile.errors == {}
    assert profile.sparsities[key].shape == profile.incoherences[key].shape == (2, HEADS)
    assert (profile.incoherences[key] > 1).all()
    full, half = profile.roundings[key]
    assert (full < 1e-9).all()
    assert ((half > 3 * full) & (half < 1e-3)).all()


def test_mass_is_a_share_of_its_row_in_the_order_of_the_head():
    q, k, v, out = tensors(4, batch=3)
    demand = demand_of((), orders=("thw", "hwt"), mass=0.5)
    steps = []
    profile = Profile(orders=demand.orders)
    profile.mass_orders = {SITE.name: ("thw", "hwt", "hwt", "thw")}
    observer = MassObserver(profile, demand, progress=lambda: steps.append(None))
    for step in range(8):
        assert observer(SITE, run_at(step), q, k, v, out) is out
    assert profile.mass_counts == {(SITE.name, 0): 2, (SITE.name, 1): 2}
    assert len(steps) == 8
    for head, order in enumerate(profile.mass_orders[SITE.name]):
        indices = Blocking(LAYOUT, order, BLOCK).indices()
        mass, _ = block_mass_reference(q[:1], k[:1], block=BLOCK, order=indices, kv_length=VALID)
        share = mass[0, head] / mass[0, head].sum(-1, keepdim=True)
        found = profile.masses[SITE.name, 1][head].double()
        torch.testing.assert_close(found, share.double(), rtol=1e-4, atol=1e-6)


def test_an_unknown_place_is_left_alone():
    call = tensors(3)
    calibrator = calibrator_of()
    assert calibrator(SITE, Run(None, LAYOUT, phase=Phase(0, 0)), *call) is call[3]
    assert not calibrator.profile.errors


def test_candidates_that_choose_themselves_are_refused():
    both = Alternatives((Choice(Window(1, 1, 1)), Choice(Window(1, 1, 1), order="hwt")))
    with pytest.raises(PlanError, match="give its options instead"):
        calibrator_of(demand_of((DENSE, Choice(both))))


def test_a_new_generation_forgets_the_one_before():
    calibrator = calibrator_of(demand_of(TAKEN_OVER[1:2]))
    calibrator(SITE, run_at(1), *tensors(0))
    calibrator.begin()
    calibrator(SITE, run_at(2), *tensors(1))
    assert (calibrator.profile.keeps[SITE.name, 0] == 1).all()  # nothing to take over


@pytest.mark.parametrize(
    ("prices", "best"),
    [
        ((1.0, 0.5, 0.2), [1, 2, 0]),
        (torch.tensor([[1.0] * 3, [0.5, 0.1, 0.5], [0.2] * 3]), [1, 1, 0]),
    ],
    ids=["one for all heads", "by head"],
)
def test_the_cheapest_harmless_candidate(prices, best):
    errors = torch.tensor([[0.0, 0.0, 0.4], [0.1, 0.1, 0.9], [0.3, 0.1, 0.5]])
    assert cheapest_harmless(errors, prices, 0.3) == best
