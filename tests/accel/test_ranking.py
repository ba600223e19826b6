"""From scores to kept blocks: against row-by-row loops, at ties, ragged counts and text."""

from math import ceil

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.blocking import Blocking
from accel.layout import Layout
from accel.ranking import recall_of, top_blocks, top_mass

LAYOUT = Layout.of((5, 7, 3), text_before=11, text_after=6, padding=4)
BLOCKING = Blocking(LAYOUT, "hilbert", (16, 8))


def brute_top(scores, keep, blocking):
    """Row by row: the best ceil(keep * n) visual columns."""
    text, pad = blocking.text_blocks()[1], blocking.pad_blocks()[1]
    visual = [j for j in range(blocking.kv_blocks) if not text[j] and not pad[j]]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row in kept.view(-1, blocking.kv_blocks).unbind():
        row.fill_(False)
    flat, flat_scores = kept.view(-1, blocking.kv_blocks), scores.reshape(-1, blocking.kv_blocks)
    for row, values in zip(flat, flat_scores.tolist(), strict=True):
        best = sorted(visual, key=lambda j: (-values[j], j))
        row[best[: max(1, ceil(keep * len(visual) - 1e-6))]] = True
    return blocking.force(kept)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0]))
def test_top_blocks_row_by_row(seed, keep):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (2, 3, 8, 16), generator=generator).float()  # many ties
    assert torch.equal(top_blocks(scores, keep, BLOCKING), brute_top(scores, keep, BLOCKING))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_top_mass_is_the_smallest_set(seed, tau):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, 8, 16, generator=generator) ** 4
    kept = top_mass(mass, tau, BLOCKING)
    q_text, text = BLOCKING.text_blocks()
    assert kept[:, :, q_text].all()
    for row, kept_row in zip(
        mass[:, :, ~q_text].view(-1, 16), kept[:, :, ~q_text].view(-1, 16), strict=True
    ):
        visual = kept_row & ~text
        assert kept_row[text].all()
        assert visual.any()
        assert row[kept_row].sum() >= tau * row.sum() - 1e-5
        if visual.sum() > 1:
            assert row[kept_row].sum() - row[visual].min() < tau * row.sum() + 1e-5
        assert row[visual].min() >= row[~kept_row].max() if (~kept_row).any() else True


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.floats(0.01, 0.9), st.sampled_from([0.05, 0.3, 0.7, 1.0]))
def test_top_mass_has_a_least_share(seed, tau, least):
    """It is the union of the two selections, since both take the heaviest."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 3, 8, 16, generator=generator) ** 4
    kept = top_mass(mass, tau, BLOCKING, least=least)
    expected = top_mass(mass, tau, BLOCKING) | top_blocks(mass, least, BLOCKING)
    assert torch.equal(kept, expected)


def test_counts_do_not_suffer_from_float_steps():
    """0.7 of 10 blocks is 7, though 0.7 * 10 = 7.000000000000001."""
    blocking = Blocking(Layout.of((1, 8, 10)), "thw", (8, 8))
    for keep in (0.1, 0.3, 0.7):
        counts = top_blocks(torch.zeros(1, 1, 10, 10), keep, blocking).sum(-1)
        assert (counts == round(10 * keep)).all()


def test_ties_go_to_the_first_and_minus_inf_is_never_kept():
    blocking = Blocking(Layout.of((1, 8, 10)), "thw", (8, 8))
    scores = torch.zeros(1, 1, 10, 10)
    scores[..., 0] = -torch.inf
    for kept in (top_blocks(scores, 0.3, blocking), top_blocks(scores, 1, blocking)):
        assert not kept[..., 0].any()
    assert top_blocks(scores, 0.3, blocking)[0, 0, 0].nonzero().flatten().tolist() == [1, 2, 3]
    assert top_mass(scores, 1, blocking)[0, 0, 0].tolist() == [False] + [True] * 9


def test_recall_is_the_kept_share():
    mass = torch.rand(3, 4, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = torch.rand(mass.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = (mass * keep).sum((2, 3)) / mass.sum((2, 3))
    torch.testing.assert_close(recall_of(mass.float(), keep).double(), expected)
    assert (recall_of(mass, torch.ones_like(keep)) == 1).all()
