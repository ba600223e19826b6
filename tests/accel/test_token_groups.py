"""Merging, fusion and their undoing against loops over images and tokens in float64."""

import pytest
import torch

from accel.errors import AccelError
from accel.token_groups import Groups, added, fuse, match
from accel.token_scores import class_scores, mass_scores


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(x, metric, size, count):
    """ToMe for one image by its paper: (tokens, sizes, members), in its order."""
    x, metric, size = (t.double() for t in (x, metric, size))
    n = len(x)
    metric = metric / metric.norm(dim=1, keepdim=True)
    proposals = []
    for a in range(1, n, 2):
        scores = [float(metric[a] @ metric[b]) for b in range(0, n, 2)]
        best = max(range(len(scores)), key=lambda i: scores[i])
        proposals.append((scores[best], a, 2 * best))
    proposals.sort(key=lambda p: -p[0])
    members = {i: [i] for i in range(n)}
    for _, a, b in proposals[: n - count]:
        members[b] += members.pop(a)
    order = [i for i in range(1, n, 2) if i in members] + list(range(0, n, 2))
    groups = [members[i] for i in order]
    sizes = torch.stack([size[g].sum() for g in groups])
    means = [(x[g] * size[g, None]).sum(0) for g in groups]
    return torch.stack(means) / sizes[:, None], sizes, groups


def fused(x, score, count):
    """EViT for one image, with the mean in the place of the sum."""
    x, score = x.double(), score.double()
    order = sorted(range(len(x)), key=lambda i: -float(score[i]))
    kept, others = sorted(order[: count - 1]), order[count - 1 :]
    mean = (x[others] * score[others, None]).sum(0) / score[others].sum()
    return torch.cat([x[kept], mean[None]]), [[i] for i in kept] + [others]


class TestMerging:
    @pytest.mark.parametrize(("n", "count"), [(21, 16), (21, 11), (22, 11), (8, 7), (3, 2)])
    def test_it_is_a_loop_over_pairs(self, n, count):
        x, metric = random(3, n, 5), random(3, n, 4, seed=1)
        size = torch.randint(1, 9, (3, n), generator=torch.Generator().manual_seed(2)).float()
        step = match(metric, size, count)
        found, sizes = step.reduce(x), step.total(size)
        for b in range(3):
            tokens, counted, groups = merged(x[b], metric[b], size[b], count)
            assert torch.allclose(found[b].double(), tokens, atol=1e-6)
            assert torch.equal(sizes[b].double(), counted)
            for g, group in enumerate(groups):
                assert sorted((step.into[b] == g).nonzero()[:, 0].tolist()) == sorted(group)

    def test_merging_nothing_moves_tokens_and_changes_none(self):
        x, size = random(2, 9, 4), torch.ones(2, 9)
        step = match(x, size, 9)
        assert torch.equal(step.reduce(x).gather(1, step.into[..., None].expand_as(x)), x)

    def test_ties_go_to_the_first(self):
        x = torch.ones(2, 8, 3)
        step = match(x, torch.ones(2, 8), 6)
        # tokens 1 and 3 go to token 0, the first of the group behind 5 and 7
        assert step.into[0].tolist() == [2, 2, 3, 2, 4, 0, 5, 1]
        assert torch.equal(step.into[0], step.into[1])

    def test_equal_calls_give_equal_tokens_whichever_way_they_are_summed(self):
        x, metric, size = random(2, 40, 6), random(2, 40, 4, seed=1), torch.ones(2, 40)
        step = match(metric, size, 22)
        assert torch.equal(step.reduce(x), step.reduce(x))
        groups, more = x[:, :13], x[:, 13:]
        into = torch.randint(13, (2, 27), generator=torch.Generator().manual_seed(3))
        found = [added(groups, more, into, in_any_order=which) for which in (False, True)]
        expected = groups.double().clone()
        for b in range(2):
            for i, g in enumerate(into[b].tolist()):
                expected[b, g] += more[b, i]
        for one in found:
            assert torch.allclose(one.double(), expected, atol=1e-5)


class TestFusion:
    @pytest.mark.parametrize("count", [1, 2, 9, 16])
    def test_it_is_a_loop_over_tokens(self, count):
        x, score = random(3, 17, 5), random(3, 17, seed=1).exp()
        step = fuse(score, count)
        found = step.reduce(x)
        for b in range(3):
            tokens, groups = fused(x[b], score[b], count)
            assert torch.allclose(found[b].double(), tokens, atol=1e-6)
            for g, group in enumerate(groups):
                assert sorted((step.into[b] == g).nonzero()[:, 0].tolist()) == sorted(group)
            # the place of the fused is that of its highest
            assert step.first[b, -1] == groups[-1][0]

    def test_scores_of_zero_weigh_equally(self):
        score = torch.tensor([[0.5, 0.0, 0.0, 0.5]])
        found = fuse(score, 3).reduce(torch.arange(4.0).reshape(1, 4, 1))
        assert found[0, :, 0].tolist() == [0.0, 3.0, 1.5]


class TestGroups:
    def test_patches_find_their_tokens_through_several_steps(self):
        x, prefix = random(3, 2 + 19, 4), 2
        groups = Groups.each(x, prefix)
        members = [[[i] for i in range(19)] for _ in range(3)]
        tokens = x
        for number, count in enumerate((14, 9, 8)):
            first, rest = groups.split(tokens)
            fusing = number == 1
            step = fuse(rest.norm(dim=2), count) if fusing else match(rest, groups.size, count)
            tokens, groups = torch.cat([first, step.reduce(rest)], 1), groups.after(step)
            for b in range(3):
                new = [[] for _ in range(count)]
                for i, into in enumerate(step.into[b].tolist()):
                    new[into] += members[b][i]
                members[b] = new
        spread = groups.spread(tokens)
        assert spread.shape == x.shape
        assert torch.equal(spread[:, :2], x[:, :2])
        for b in range(3):
            assert groups.size[b].tolist() == [len(g) for g in members[b]]
            for g, group in enumerate(members[b]):
                assert int(groups.place[b, g]) in group
                for patch in group:
                    assert torch.equal(spread[b, 2 + patch], tokens[b, 2 + g])
        assert torch.equal(groups.taken(spread), tokens)

    @pytest.mark.parametrize("shape", [(19, 6), (3, 19, 6), (3, 1, 19, 6), (1, 5, 19, 6)])
    def test_rows_of_a_rotary_table_are_those_of_the_places(self, shape):
        x = random(3, 1 + 19, 4)
        groups = Groups.each(x, 1).after(match(x[:, 1:], torch.ones(3, 19), 12))
        table = random(*shape)
        found = groups.rope(table)
        table = table.reshape(*(1,) * (4 - table.ndim), *table.shape).expand(3, -1, -1, -1)
        for b in range(3):
            assert torch.equal(found[b], table[b][:, groups.place[b]])


class TestBias:
    """Attention to tokens is attention to the patches that they stand for, under a mask too."""

    @pytest.mark.parametrize("kind", ["none", "keys", "float", "rows", "heads"])
    def test_tokens_count_as_their_members(self, kind):
        batch, heads, n, prefix, dim = 3, 2, 13, 2, 4
        x = random(batch, prefix + n, dim)
        groups = Groups.each(x, prefix).after(match(x[:, prefix:], torch.ones(batch, n), 8))
        total = prefix + n
        mask = {
            "none": None,
            "keys": random(batch, 1, 1, total, seed=3) > -0.7,
            "float": random(batch, 1, 1, total, seed=3) * 3,
            "rows": random(total, total, seed=3) > -1.0,
            "heads": random(1, heads, total, total, seed=3),
        }[kind]
        if kind in ("keys", "rows"):
            mask[..., 0] = True
        tokens = random(batch, heads, prefix + 8, dim, seed=4).double()
        index = torch.cat([torch.arange(prefix).expand(batch, -1), prefix + groups.source], 1)
        place = torch.cat([torch.arange(prefix).expand(batch, -1), prefix + groups.place], 1)
        bias = groups.bias(mask, proportional=True)
        logits = tokens @ tokens.mT + bias
        found = logits.softmax(-1) @ tokens
        for b in range(batch):
            # every patch by itself
            keys = tokens[b][:, index[b]]
            logits = tokens[b] @ keys.mT
            if mask is not None:
                full = mask.expand(batch, heads, total, total)[b][:, place[b]]
                full = full.double() if mask.dtype != torch.bool else full
                hidden = torch.zeros_like(logits)
                logits += (
                    hidden.masked_fill(~full, -torch.inf) if full.dtype == torch.bool else full
                )
            assert torch.allclose(found[b], logits.softmax(-1) @ keys, atol=1e-6)

    def test_without_proportion_a_token_counts_once(self):
        x = random(2, 1 + 9, 4)
        groups = Groups.each(x, 1).after(match(x[:, 1:], torch.ones(2, 9), 6))
        assert groups.bias(None, proportional=False) is None
        mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
        found = groups.bias(mask, proportional=False)
        assert torch.allclose(found, torch.zeros_like(found), atol=1e-6)

    def test_a_token_whose_members_are_all_hidden_is_hidden(self):
        x = random(2, 1 + 9, 4)
        groups = Groups.each(x, 1).after(match(x[:, 1:], torch.ones(2, 9), 6))
        mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
        mask[0, ..., 1:] = groups.source[0] != 2
        found = groups.bias(mask, proportional=True)
        assert (found[0, 0, 0] == -torch.inf).nonzero()[:, 0].tolist() == [3]
        assert torch.isfinite(found[1]).all()


class TestScores:
    @pytest.mark.parametrize("biased", [False, True])
    def test_they_are_those_of_the_whole_map(self, biased):
        q, k = random(3, 2, 15, 4), random(3, 2, 15, 4, seed=1)
        bias = random(3, 1, 1, 15, seed=2) if biased else None
        weights = random(3, 15, seed=3).exp()
        logits = q.double() @ k.double().mT * 0.3 + (bias if biased else 0)
        whole = logits.softmax(-1)
        found = class_scores(q, k, scale=0.3, bias=bias)
        assert torch.allclose(found.double(), whole[:, :, 0].mean(1), atol=1e-6)
        found = mass_scores(q, k, scale=0.3, bias=bias, weights=weights)
        share = weights.double() / weights.double().sum(1, keepdim=True)
        expected = (whole * share[:, None, :, None]).sum(2).mean(1)
        assert torch.allclose(found.double(), expected, atol=1e-6)
        assert torch.allclose(found.sum(1), torch.ones(3), atol=1e-5)

    def test_a_hidden_key_gets_nothing(self):
        q, k = random(2, 2, 9, 4), random(2, 2, 9, 4, seed=1)
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[..., 4] = False
        for found in (
            class_scores(q, k, scale=0.5, bias=mask),
            mass_scores(q, k, scale=0.5, bias=mask),
        ):
            assert (found[:, 4] == 0).all()
            assert (found[:, 5] > 0).all()

    def test_a_mask_that_differs_between_queries_has_no_sums(self):
        q = random(2, 2, 9, 4)
        with pytest.raises(AccelError, match=r"use tokens\.score"):
            mass_scores(q, q, scale=0.5, bias=torch.zeros(9, 9))
