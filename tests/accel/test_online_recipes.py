"""What makes each recipe that decides by formula or while the model runs the method it is."""

from math import sqrt

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.errors import PlanError
from accel.estimators import Antidiagonal, Joined, PooledMass, Residual, SubBlock, Threshold
from accel.geometry import Geometry, Site
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.attention import sparse_attention
from accel.layout import Layout
from accel.masks import site_mask
from accel.pattern import Band, FirstFrames, Window
from accel.pattern_union import Union
from accel.recipes import recipe

GRID = (6, 8, 10)
LAYOUT = Layout.of(GRID)
SITES = (Site("a", 3, 12), Site("b", 3, 12))
GEOMETRY = Geometry("M", SITES, LAYOUT)


def tensors(layout=LAYOUT, batch=2, heads=3, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, layout.length, dim, generator=generator) for _ in range(3)]


def choices_of(name, band=0, geometry=GEOMETRY, **parameters):
    """Those of the last site."""
    return recipe(name, geometry, **parameters).choices("b", band)


def masked(name, q, k, v, *, block, band=0, layout=LAYOUT, **parameters):
    choices = choices_of(name, band, block=block, **parameters)
    return site_mask(choices, q, k, v, layout=layout, block=block, lse={})


def along(axis, sharpness=4.0):
    """q and k of heads whose tokens look at those of one place on an axis of the grid."""
    place = LAYOUT.coordinates()[:, "thw".index(axis)]
    size = GRID["thw".index(axis)]
    return torch.nn.functional.pad(torch.eye(size)[place], (0, 12 - size)) * sharpness


class TestSVG:
    def test_both_kinds_have_one_band_of_the_share_that_is_asked(self):
        spatial, temporal = choices_of("svg", keep=0.3)[0].select.options
        assert spatial == Choice(Band(1 - sqrt(0.7)))
        assert temporal == Choice(Band(1 - sqrt(0.7)), order="hwt")
        tokens = spatial.select.mask(Blocking(LAYOUT, "thw", (1, 1)))
        assert tokens.float().mean() == pytest.approx(0.3, abs=0.002)

    def test_text_takes_its_part_of_the_share(self):
        layout = Layout.of(GRID, text_before=20, text_after=28)
        geometry = Geometry("M", SITES, layout)
        spatial, _ = choices_of("svg", geometry=geometry, keep=0.4)[0].select.options
        tokens = spatial.select.mask(Blocking(layout, "thw", (1, 1)))
        assert tokens.float().mean() == pytest.approx(0.4, abs=0.002)
        spatial, _ = choices_of("svg", geometry=geometry, keep=0.1)[0].select.options
        assert spatial.select == Band(0)

    def test_a_sink_is_for_spatial_heads(self):
        spatial, temporal = choices_of("svg", sink_frames=2)[0].select.options
        assert spatial.select == Union((temporal.select, FirstFrames(2)))

    def test_heads_are_told_apart_while_the_model_runs(self):
        q, _, v = tensors()
        q[:, 0] = q[:, 2] = along("t")  # a frame is a run of the natural order
        place = torch.arange(80).repeat(6)
        waves = place[:, None] * torch.tensor([0.9, 1.7, 2.3, 0.4, 1.3, 2.9])
        q[:, 1] = torch.cat([waves.sin(), waves.cos()], 1) * 3
        found = masked("svg", q, q, v, block=(16, 16))
        for head, order in enumerate(("thw", "hwt", "thw")):
            indices = Blocking(LAYOUT, order).indices()
            assert torch.equal(found.order[head], torch.arange(480) if indices is None else indices)


class TestJenga:
    def test_neighbours_in_space_and_time_are_kept_whatever_the_scores(self):
        q, k, v = tensors()
        found = masked("jenga", q, k, v, block=(16, 16), keeps=(0.01, 0.01), tau=0.01)
        order = found.order[0].argsort()
        place = LAYOUT.coordinates()
        near = ((place[:, None] - place[None]).abs() <= 1).all(-1)
        i, j = (order[x] // 16 for x in near.nonzero().T)
        keep = found.mask.to_dense()
        assert keep[:, :, i, j].all()
        neighbours = torch.zeros(30, 30, dtype=torch.bool)
        neighbours[i, j] = True
        # and hardly anything else: one block of a row at most
        assert ((keep & ~neighbours).sum(-1) <= 1).all()
        assert (keep & ~neighbours).any()

    def test_the_second_half_keeps_less_and_both_a_least_share(self):
        plan = recipe("jenga", GEOMETRY)
        assert plan.schedule.bands == (0.5,)
        first, second = (plan.choices("a", band)[0] for band in (0, 1))
        assert first == Choice(
            Joined(PooledMass(tau=0.3, least=0.25), Window(1, 1, 1)), order="hilbert"
        )
        assert second.select.estimator.least == 0.15
        with pytest.raises(PlanError, match="has 1 bands, the schedule has 2"):
            recipe("jenga", GEOMETRY, keeps=(0.25,))


class TestXAttention:
    def test_the_fewest_blocks_that_antidiagonals_say_hold_tau(self):
        q, k, v = tensors()
        keep = masked("xattention", q * 3, k, v, block=(16, 16), stride=4).mask.to_dense()
        mass = antidiagonal_scores(q * 3, k, stride=4, block=(16, 16))
        held = (mass * keep).sum(-1) / mass.sum(-1)
        lightest = mass.masked_fill(~keep, torch.inf).amin(-1) / mass.sum(-1)
        assert (held >= 0.9 - 1e-5).all()
        assert (held - lightest < 0.9 + 1e-5).all()
        assert not keep.all()

    def test_defaults(self):
        plan = recipe("xattention", GEOMETRY)
        assert set(plan.choices("a", 0)) == {Choice(Antidiagonal(tau=0.9, stride=8))}
        assert plan.block == (128, 128)


class TestSparge:
    def test_blocks_that_no_mean_speaks_for_are_not_judged_by_it(self):
        """Tokens of one block point everywhere: as keys all rows see them, as queries they see all.

        Those of all others point one way, and see the blocks of their frame alone.
        """
        q, k, v = tensors()
        q[:] = k[:] = along("t", 8.0)  # a frame has five whole blocks
        keep = masked("sparge", q, k, v, block=(16, 16)).mask.to_dense()
        frame = torch.arange(30) // 5
        assert torch.equal(keep, (frame[:, None] == frame).expand_as(keep))
        generator = torch.Generator().manual_seed(1)
        q[:, :, 32:48], k[:, :, 48:64] = torch.randn(2, 16, 12, generator=generator)
        found = masked("sparge", q, k, v, block=(16, 16)).mask.to_dense()
        assert found[:, :, 2].all()
        assert found[..., 3].all()
        others = [i for i in range(30) if i not in (2, 3)]
        assert torch.equal(found[:, :, others][..., others], keep[:, :, others][..., others])

    def test_defaults(self):
        plan = recipe("sparge", GEOMETRY)
        assert set(plan.choices("a", 0)) == {Choice(PooledMass(tau=0.98, similarity=0.6))}
        assert plan.block == (128, 64)


class TestMMInferenceGrid:
    @pytest.mark.parametrize("axis", "thw")
    def test_the_stride_and_the_phase_are_those_of_the_lines(self, axis):
        """Tokens look at the second place of an axis: an order in which it varies slowest is taken,
        and the blocks of that place are kept by all rows.
        """
        layout = Layout.of((4, 8, 12))  # a place is whole blocks of 16, whatever the axis
        size = layout.grid["thw".index(axis)]
        on_line = layout.coordinates()[:, "thw".index(axis)] == 1
        _, _, v = tensors(layout)
        q, k = torch.ones_like(v), on_line[:, None] * 2.0 * torch.ones_like(v)
        settings = {"block": (16, 16), "lines": 1 / size, "local": 0.01}
        found = masked("mminference_grid", q, k, v, layout=layout, **settings)
        near = (torch.arange(24)[:, None] - torch.arange(24)).abs() <= 1
        for head in range(3):
            order = torch.arange(384) if found.order is None else found.order[head]
            line = on_line[order].unflatten(0, (-1, 16)).all(1)
            assert line.nonzero().flatten().tolist() == list(range(24 // size, 48 // size))
            keep = found.mask.to_dense()[:, head]
            assert keep[..., line].all()
            assert not (keep & ~line & ~near).any()

    def test_rows_near_the_diagonal_are_kept(self):
        q, k, v = tensors()
        found = masked("mminference_grid", q, k, v, block=(16, 16), lines=0.01, local=0.1)
        band = Band(0.1).mask(Blocking(LAYOUT, "thw", (16, 16)))
        assert found.mask.to_dense()[..., band].all()
        assert not found.mask.to_dense().all()


class TestSolAttn:
    def test_what_is_not_exact_stands_as_means(self):
        found = masked("sol_attn", *tensors(), block=(16, 16))
        assert found.rest == "mean"
        assert torch.equal(found.order[0], Blocking(LAYOUT, "morton").indices())

    def test_the_threshold_sets_the_budget(self):
        """Every block is exact below all scores, and only neighbours are above them."""
        q, k, v = tensors()
        keeps = {
            t: masked("sol_attn", q, k, v, block=(16, 16), tau=t).mask for t in (-99.0, 0.0, 99.0)
        }
        assert keeps[-99.0].keep == 1
        assert 0.4 < keeps[0.0].keep < 0.6
        near = (torch.arange(30)[:, None] - torch.arange(30)).abs() <= 1
        assert torch.equal(keeps[99.0].to_dense(), near.expand(2, 3, -1, -1))

    def test_defaults_and_a_sink(self):
        plan = recipe("sol_attn", GEOMETRY)
        assert set(plan.choices("b", 0)) == {Choice(Threshold(1.0), order="morton", rest="mean")}
        assert plan.block == (64, 64)
        select = choices_of("sol_attn", sink_frames=1, variance="exact")[0].select
        assert select == Joined(Threshold(1.0, "exact"), FirstFrames(1))


class TestSubBlock:
    def test_cells_see_what_block_means_do_not(self):
        """Half of a block of keys cancels the other half in the mean, and holds all the mass."""
        q, k, v = tensors()
        q[:] = 1.0
        k *= 0.1
        k[:, :, 64:80], k[:, :, 80:96] = 2.0, -2.0
        settings = {"block": (32, 32), "keep": 1 / 15}
        keep = masked("subblock", q, k, v, **settings).mask.to_dense()
        assert keep[..., 2].all()
        assert keep.sum() == keep[..., 2].sum()
        whole = masked("subblock", q, k, v, **settings, q_cells=1, kv_cells=1).mask.to_dense()
        assert not whole[..., 2].all()

    def test_defaults(self):
        plan = recipe("subblock", GEOMETRY)
        assert set(plan.choices("a", 0)) == {Choice(SubBlock(keep=0.25, q_cells=4, kv_cells=4))}
        assert plan.block == (64, 64)
        with pytest.raises(PlanError, match="cannot be cut in 4 x 3 cells"):
            recipe("subblock", GEOMETRY, kv_cells=3)


class TestSVGEAR:
    def test_exactness_goes_where_means_err_not_where_mass_is(self):
        """At the same share of blocks its output is nearer to dense than that of the heaviest."""
        q, k, v = tensors(heads=3)
        q, k = q.mean(2, keepdim=True) * 20 + 0.3 * q, 0.2 * k
        k[:, :, :160] += q.mean(2, keepdim=True) * 0.3  # heavy, and much alike
        k[:, :, 160:240] *= 10  # light in the mean, and not alike
        block = (16, 16)
        found = masked("svg_ear", q, k, v, block=block, order="thw")
        assert found.rest == "mean"
        heavy = (Choice(SubBlock(keep=0.25), rest="mean"),) * 3
        other = site_mask(heavy, q, k, v, layout=LAYOUT, block=block, lse={})
        assert other.keep == found.keep
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        error = [
            (sparse_attention(q, k, v, m.mask, rest="mean") - dense).square().sum()
            for m in (found, other)
        ]
        assert error[0] < error[1] / 2

    def test_defaults(self):
        plan = recipe("svg_ear", GEOMETRY)
        choice = Choice(Residual(keep=0.25), order="tile(4,4,4)", rest="mean")
        assert set(plan.choices("b", 0)) == {choice}
        assert plan.block == (64, 64)
