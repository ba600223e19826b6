"""Against plain loops over samples in float64, written from the papers' definitions."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from accel.commit import Sampling, candidates, committed, even_split, uniform
from accel.decoding import CONFIDENCES, RULES, SPEAKS_OF, Decoding

VOCABULARY = 7


def sure_of(kind, shares, token):
    """The confidence in `token`, of the probabilities of one place."""
    if kind == "probability":
        return shares[token]
    if kind == "margin":
        best, second = sorted(shares, reverse=True)[:2]
        return best - second
    assert kind == "entropy"
    return sum(p * torch.tensor(p).double().log().item() for p in shares if p > 0)


def chosen_by(decoding, sure, quota, late):
    """Places to commit of one sample, best first; sure: by open place, late: those put last."""
    # equal ones from the left; Python sorts stably
    order = sorted(sure, key=lambda i: inf if i in late else -sure[i])
    ranked = [-inf if i in late else sure[i] for i in order]
    bound, n = decoding.bound, len(order)
    if decoding.rule == "quota":
        count = quota
    elif decoding.rule == "threshold":
        count = sum(c >= bound for c in ranked)
    elif decoding.rule == "threshold_or_quota":
        above = sum(c > bound for c in ranked)
        count = above if above >= quota else quota
    elif decoding.rule == "factor":
        count = max(
            (m for m in range(1, n + 1) if (m + 1) * (1 - ranked[m - 1]) < bound), default=0
        )
    else:
        # all but the largest of the entropies sum to at most the bound
        count = 0
        while count < n and ranked[count] > -inf and sum(-c for c in ranked[:count]) <= bound:
            count += 1
    return order[: min(max(count, 1), n)]


def expected(decoding, tokens, shares, open_, quota, last=()):
    out = torch.zeros_like(open_)
    for sample in range(len(tokens)):
        places = open_[sample].nonzero()[:, 0].tolist()
        sure = {
            i: sure_of(
                decoding.confidence, shares[sample, i].double().tolist(), int(tokens[sample, i])
            )
            for i in places
        }
        late = {i for i in places if int(tokens[sample, i]) in last}
        for i in chosen_by(decoding, sure, int(quota[sample]), late):
            out[sample, i] = True
    return out


@st.composite
def steps(draw):
    """A decoding and one step of it for three samples; probabilities are eighths, so that sums are
    exact and there are ties.
    """
    rule = draw(st.sampled_from(tuple(RULES)))
    limits = RULES[rule]
    bound = None
    if limits is not None:
        bounds = [0.0, 0.125, 0.3, 0.5, 0.875, 1.0, 2.5, 40.0]
        bound = draw(st.sampled_from([b for b in bounds if b <= limits[1]]))
    known = [c for c in SPEAKS_OF.get(rule, CONFIDENCES) if c != "random"]
    decoding = Decoding(confidence=draw(st.sampled_from(known)), rule=rule, bound=bound)
    length, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    last = draw(st.sampled_from([(), (0,), (0, 3), tuple(range(VOCABULARY))]))
    g = torch.Generator().manual_seed(seed)
    spread = draw(st.integers(1, VOCABULARY))
    cells = torch.randint(0, spread, (3, length, 8), generator=g)
    shares = torch.nn.functional.one_hot(cells, VOCABULARY).sum(2) / 8
    open_ = torch.rand(3, length, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    quota = torch.randint(0, length + 1, (3,), generator=g)
    return decoding, shares.argmax(-1), shares, open_, quota, last


@settings(max_examples=300)
@given(steps())
def test_every_rule_is_its_definition(step):
    decoding, tokens, shares, open_, quota, last = step
    if decoding.confidence == "entropy" and decoding.rule == "entropy_bound":
        # entropies are no eighths: bounds keep clear of their sums
        decoding = Decoding(confidence="entropy", rule="entropy_bound", bound=decoding.bound + 1e-3)
    out = committed(decoding, tokens, shares, open_, quota, last=last)
    want = expected(decoding, tokens, shares, open_, quota, last)
    if decoding.confidence == "entropy":
        # the same shares in another order have entropies that differ in the last bit
        assert torch.equal(out.sum(1), want.sum(1))
        entropy = torch.special.entr(shares.double()).sum(-1)
        for got, meant, h in zip(out, want, entropy, strict=True):
            assert torch.allclose(h[got].sort().values, h[meant].sort().values)
    else:
        assert torch.equal(out, want)
    assert not (out & ~open_).any()
    assert torch.equal(out.any(1), open_.any(1))


@settings(max_examples=100)
@given(
    st.sampled_from([(r, c) for r in RULES for c in SPEAKS_OF.get(r, CONFIDENCES)]),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_rules_at_random(how, bound, seed):
    """Confidences without ties; and a sample of a batch is committed as it is alone."""
    rule, confidence = how
    decoding = Decoding(
        rule=rule, confidence=confidence, bound=None if RULES[rule] is None else bound
    )
    g = torch.Generator().manual_seed(seed)
    shares = (4 * torch.randn(3, 11, VOCABULARY, generator=g)).softmax(-1)
    tokens, open_ = shares.argmax(-1), torch.rand(3, 11, generator=g) < 0.6
    quota = torch.randint(0, 5, (3,), generator=g)

    def run(rows):
        streams = [torch.Generator().manual_seed(seed + i) for i in range(3)][rows]
        return committed(
            decoding, tokens[rows], shares[rows], open_[rows], quota[rows], generator=streams
        )

    together = run(slice(0, 3))
    for i in range(3):
        assert torch.equal(run(slice(i, i + 1))[0], together[i])
    if confidence != "random":
        assert torch.equal(together, expected(decoding, tokens, shares, open_, quota))
    else:
        wanted = torch.minimum(quota.clamp(min=1), open_.sum(1))
        assert torch.equal(together.sum(1), wanted)


EVERY = [
    Decoding(rule=rule, confidence=SPEAKS_OF.get(rule, CONFIDENCES)[0], bound=bound)
    for rule in RULES
    for bound in ([None] if RULES[rule] is None else [0.0, 1.0])
]


@pytest.mark.parametrize("decoding", EVERY, ids=lambda d: f"{d.rule} {d.bound}")
def test_nothing_open_and_one_token_open(decoding):
    shares = torch.rand(3, 4, VOCABULARY).softmax(-1)
    open_ = torch.zeros(3, 4, dtype=torch.bool)
    open_[1, 2] = True
    out = committed(decoding, shares.argmax(-1), shares, open_, torch.zeros(3, dtype=torch.long))
    assert torch.equal(out, open_)


def test_equal_confidences_go_from_left_to_right():
    shares = torch.full((1, 300, 4), 0.25)
    tokens = torch.zeros(1, 300, dtype=torch.long)
    open_ = torch.arange(300)[None] % 3 == 1
    out = committed(Decoding(), tokens, shares, open_, torch.tensor([40]))
    assert out.nonzero()[:, 1].tolist() == list(range(1, 120, 3))


class TestLast:
    """Ids that are committed only when nothing else is left, whatever the rule."""

    SHARES = torch.tensor([[[0.99, 0.01], [0.3, 0.7], [0.98, 0.02], [0.4, 0.6]]])
    TOKENS = torch.tensor([[0, 1, 0, 1]])

    @pytest.mark.parametrize(
        "decoding",
        [
            Decoding(),
            Decoding(rule="threshold", bound=0.5),
            Decoding(rule="threshold_or_quota", bound=0.5),
            Decoding(rule="factor", bound=3.0),
            Decoding(rule="entropy_bound", bound=5.0, confidence="entropy"),
            Decoding(rule="entropy_bound", bound=0.1, confidence="entropy"),
            Decoding(confidence="entropy"),
            Decoding(confidence="random"),
        ],
        ids=lambda d: f"{d.rule} {d.bound} {d.confidence}",
    )
    def test_they_wait(self, decoding):
        open_, quota = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
        out = committed(decoding, self.TOKENS, self.SHARES, open_, quota, last=(0,))
        assert out[0, [1, 3]].any()
        assert not out[0, [0, 2]].any()
        left = torch.tensor([[True, False, True, False]])
        out = committed(decoding, self.TOKENS, self.SHARES, left, quota, last=(0,))
        assert out.any()


@given(st.integers(0, 500), st.integers(1, 60))
def test_shares_of_an_even_split(tokens, n):
    shares = even_split(tokens, n)
    assert (len(shares), sum(shares)) == (n, tokens)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


class TestCandidates:
    LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, -30.0])

    def draws(self, sampling, n=20_000, seed=5):
        logits = self.LOGITS.expand(4, n // 4, -1)
        tokens, _ = candidates(logits, sampling, torch.Generator().manual_seed(seed))
        return torch.bincount(tokens.flatten(), minlength=len(self.LOGITS))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_they_follow_the_distribution(self, temperature):
        shares = (self.LOGITS.double() / temperature).softmax(-1)
        seen = self.draws(Sampling(temperature=temperature)).double()
        rare = shares * seen.sum() < 5
        assert seen[rare].sum() <= 10
        likely = shares[~rare] / shares[~rare].sum()
        assert chisquare(seen[~rare], likely * seen[~rare].sum()).pvalue > 0.01

    def test_without_temperature_it_is_the_likeliest(self):
        logits = torch.randn(3, 5, 40)
        tokens, shares = candidates(logits, Sampling(top_k=3, top_p=0.1))
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.equal(shares, logits.softmax(-1))

    def test_shares_are_those_without_temperature(self):
        logits = torch.randn(3, 5, 40)
        drawn = Sampling(temperature=2.0, top_k=3, top_p=0.5)
        _, shares = candidates(logits, drawn, torch.Generator().manual_seed(0))
        assert torch.equal(shares, logits.softmax(-1))

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_never_is_has_no_share(self, temperature):
        logits = torch.randn(3, 50, 6)
        before = logits.clone()
        sampling = Sampling(temperature=temperature, never=(0, 4))
        tokens, shares = candidates(logits, sampling, torch.Generator().manual_seed(0))
        assert not torch.isin(tokens, torch.tensor([0, 4])).any()
        assert not shares[..., [0, 4]].any()
        assert torch.allclose(shares.sum(-1), torch.ones(3, 50))
        assert torch.equal(logits, before)

    @pytest.mark.parametrize(
        ("sampling", "left"),
        [
            (Sampling(temperature=1.0, top_k=1), {0}),
            (Sampling(temperature=1.0, top_k=3), {0, 1, 2}),
            (Sampling(temperature=1.0, top_k=99), {0, 1, 2, 3, 4}),
            (Sampling(temperature=1.0, top_p=1e-9), {0}),
            (Sampling(temperature=1.0, top_p=0.99), {0, 1, 2, 3, 4}),
            (Sampling(temperature=1.0, top_k=2, top_p=0.5), {0}),
            # softmax of (2, 0.5, 1, -1, 0): 0.57, 0.13, 0.21, 0.03, 0.08
            (Sampling(temperature=1.0, top_p=0.56), {0}),
            (Sampling(temperature=1.0, top_p=0.58), {0, 2}),
            (Sampling(temperature=1.0, top_p=0.8), {0, 1, 2}),
            # at a temperature of 4: 0.30, 0.21, 0.23, 0.14, 0.18 of what 5 leaves
            (Sampling(temperature=4.0, top_p=0.25), {0}),
            (Sampling(temperature=4.0, top_p=0.5), {0, 2}),
            (Sampling(temperature=4.0, top_p=0.6), {0, 1, 2}),
        ],
        ids=str,
    )
    def test_what_top_k_and_top_p_leave(self, sampling, left):
        seen = self.draws(sampling).nonzero()[:, 0].tolist()
        assert set(seen) == left

    def test_low_precision_is_drawn_as_float64(self):
        """Of two that differ by less than bf16 tells, both are drawn."""
        sampling = Sampling(temperature=1.0)
        logits = self.LOGITS.bfloat16().expand(1, 400, -1)
        low, _ = candidates(logits, sampling, torch.Generator().manual_seed(0))
        high, _ = candidates(logits.double(), sampling, torch.Generator().manual_seed(0))
        assert torch.equal(low, high)

    @pytest.mark.parametrize("sampling", [Sampling(temperature=1.0)], ids=str)
    def test_generators_by_sample_do_not_know_the_batch(self, sampling):
        logits = torch.randn(3, 9, 40)

        def run(rows):
            streams = [torch.Generator().manual_seed(7 + i) for i in rows]
            return candidates(logits[rows], sampling, streams)[0]

        assert torch.equal(run([0, 1, 2]), torch.cat([run([0]), run([1]), run([2])]))
        assert not torch.equal(run([0, 1]), run([0, 2]))

    def test_one_generator_is_for_the_whole_batch(self):
        made = uniform((2, 3), torch.Generator().manual_seed(1), torch.device("cpu"))
        assert made.dtype == torch.float64
        again = uniform((2, 3), [torch.Generator().manual_seed(1), None], torch.device("cpu"))
        assert torch.equal(made[0], again[0])
        assert torch.equal(again[1], torch.full((3,), 0.5, dtype=torch.float64))
        with pytest.raises(ValueError, match="shorter"):
            uniform((2, 3), [None], torch.device("cpu"))
