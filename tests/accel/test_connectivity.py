"""The trained predictor of blocks: its scores by loops, in plans and their files."""

import base64
import json

import pytest
import torch

from accel.blocking import Blocking
from accel.choice import Choice
from accel.errors import PlanError
from accel.estimators import Connectivity, Pooled, estimator_from_dict
from accel.geometry import Geometry, Site
from accel.layout import Layout
from accel.plan import Plan
from accel.ranking import top_blocks
from accel.schedule import Schedule

LAYOUT = Layout.of((1, 9, 13), text_before=5)
BLOCKING = Blocking(LAYOUT, "hilbert", (16, 8))
HEADS, DIM, RANK = 4, 6, 5


def weights(seed=0, heads=HEADS, rank=RANK):
    return torch.randn(2, heads, 3 * DIM, rank, generator=torch.Generator().manual_seed(seed))


def tensors(heads=HEADS, kv_heads=2, dim=DIM):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, n, LAYOUT.length, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def loops(q, k, matrices, scale):
    """Scores of pairs of blocks, one by one, in float64."""
    order = BLOCKING.indices()
    rows, columns = BLOCKING.block
    found = torch.empty(len(q), q.shape[1], BLOCKING.q_blocks, BLOCKING.kv_blocks).double()

    def statistics(x):
        x = x.double()
        mean, spread = x.mean(0), x.var(0, correction=0)
        return torch.cat([mean, mean**2 * scale, spread * scale])

    for b in range(len(q)):
        for h in range(q.shape[1]):
            one, other = q[b, h, order], k[b, h // (q.shape[1] // k.shape[1]), order]
            for i in range(BLOCKING.q_blocks):
                for j in range(BLOCKING.kv_blocks):
                    keys = other[j * columns : (j + 1) * columns]
                    left = statistics(one[i * rows : (i + 1) * rows]) @ matrices[0, h].double()
                    right = statistics(keys) @ matrices[1, h].double()
                    found[b, h, i, j] = scale * left @ right + torch.tensor(len(keys)).log()
    return found


def test_it_keeps_the_best_by_its_scores():
    q, k, v = tensors()
    estimator = Connectivity.of(weights(), 0.3)
    expected = loops(q, k, estimator.weights(), DIM**-0.5)
    found = estimator.select(q, k, v, blocking=BLOCKING).keep
    assert torch.equal(found, top_blocks(expected.float(), 0.3, BLOCKING))
    text_rows, text_columns = BLOCKING.text_blocks()
    assert found[:, :, text_rows].all()
    assert found[..., text_columns].all()
    assert 0.25 < found[..., ~text_rows, :][..., ~text_columns].float().mean() < 0.4


def test_with_unit_matrices_it_is_the_product_of_means():
    q, k, v = (x[:, :, :112] for x in tensors())
    blocking = Blocking(Layout.of((1, 7, 16)), "hilbert", (16, 8))  # all blocks are whole
    unit = torch.zeros(2, HEADS, 3 * DIM, DIM)
    unit[:, :, :DIM] = torch.eye(DIM)
    found = Connectivity.of(unit, 0.3).select(q, k, v, blocking=blocking).keep
    means = Pooled(0.3, value_bias=False).select(q, k, v, blocking=blocking).keep
    assert torch.equal(found, means)


def test_hidden_padding_is_never_kept():
    q, k, v = tensors()
    found = Connectivity.of(weights(), 0.3).select(q, k, v, blocking=BLOCKING, kv_length=60).keep
    order = BLOCKING.indices()
    valid = torch.nn.functional.pad(order < 60, (0, -len(order) % 8)).unflatten(0, (-1, 8)).any(1)
    assert not found[..., ~valid].any()


class TestPlans:
    def plan(self):
        sites = tuple(Site(f"blocks.{i}.attn", HEADS, DIM) for i in range(2))
        geometry = Geometry("M", sites)
        chosen = {
            s.name: ((Choice(Connectivity.of(weights(i), 0.3), order="hilbert"),) * HEADS,)
            for i, s in enumerate(sites)
        }
        return Plan.of("c", geometry, chosen, schedule=Schedule(dense_start=0.0), block=(64, 64))

    def test_weights_lie_beside_the_plan(self, tmp_path):
        plan = self.plan()
        path = plan.save(tmp_path / "plan.json")
        assert (tmp_path / "plan.safetensors").is_file()
        text = path.read_text()
        assert len(text) < 3000
        assert json.loads(text)["choices"][1]["select"]["bits"] == 1
        assert Plan.load(path) == plan
        (tmp_path / "plan.safetensors").unlink()
        with pytest.raises(PlanError, match="not beside it"):
            Plan.load(path)

    def test_a_plan_in_memory_has_them_as_text(self):
        plan = self.plan()
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    def test_weights_are_rounded_once(self):
        estimator = Connectivity.of(weights(), 0.3)
        assert torch.allclose(estimator.weights(), weights(), rtol=1e-3, atol=1e-4)
        assert Connectivity.of(estimator.weights(), 0.3) == estimator
        assert len(estimator.name) < 60

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"keep": 0.0}, "fraction"),
            ({"rank": 4}, "bits are"),
            ({"heads": 0}, "heads is a number"),
            ({"dim": 999}, "dim is a number"),
            ({"bits": "%%"}, "no base64"),
            ({"bits": base64.b64encode(b"\xff" * 1440).decode()}, "not finite"),
            ({"bits": 3}, "bits"),
        ],
    )
    def test_what_cannot_be_is_refused(self, change, said):
        data = Connectivity.of(weights(), 0.3).to_dict()
        with pytest.raises(ValueError, match=said):
            estimator_from_dict({**data, **change})

    def test_other_heads_than_trained(self):
        q, k, v = tensors(heads=2, kv_heads=2)
        with pytest.raises(ValueError, match="trained for 4 heads of 6 channels"):
            Connectivity.of(weights(), 0.3).select(q, k, v, blocking=BLOCKING)
