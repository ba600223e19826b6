"""A text model as the pipeline calls it."""

import pytest
import torch
from tiny_text import LONGEST, MASK, MODELS, PADDED, euro_bert
from torch import nn

from accel.pipelines.text_host import TextHost

TOKENS = torch.arange(3, 17)[None]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_some_rows(name):
    """The rows of those of all; where the model says what makes logits, nothing else is made."""
    host = TextHost(MODELS[name]())
    whole = host.logits(TOKENS, None, None, None)
    assert whole.shape[:2] == (1, 14)
    made = []
    head = host.model.get_output_embeddings() if name != "llada" else None
    if head is not None:
        head.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    for rows in ((4, 9), (0, 14), (13, 14)):
        found = host.logits(TOKENS, None, None, rows)
        torch.testing.assert_close(found, whole[:, slice(*rows)], atol=1e-5, rtol=1e-5)
    if head is not None:
        assert made == [5, 14, 1]
        assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", [n for n in MODELS if n != "llada"])
@torch.no_grad()
def test_positions_are_given(name):
    host = TextHost(MODELS[name]())
    plain = host.logits(TOKENS, None, None, None)
    counted = host.logits(TOKENS, torch.arange(14)[None], None, None)
    assert torch.equal(counted, plain)
    assert not torch.allclose(host.logits(TOKENS, 3 * torch.arange(14)[None], None, None), plain)


@pytest.mark.parametrize("name", PADDED)
def test_a_model_is_tried_once(name):
    host, calls = TextHost(MODELS[name]()), []
    host.model.register_forward_hook(lambda *_: calls.append(1))
    host.check(padded=False)
    assert len(calls) == 1
    host.check(padded=True)
    first = len(calls)
    host.check(padded=True)
    assert len(calls) == first <= 3


def test_how_long_texts_may_be():
    assert TextHost(euro_bert()).longest == LONGEST
    assert TextHost(MODELS["llada"]()).longest == LONGEST
    bare = nn.Linear(2, 2)
    assert TextHost(bare).longest is None
    assert TextHost(bare).config is None


def test_no_keys_are_kept_by_the_model_itself():
    """`use_cache` is turned off where a model has it."""
    host, seen = TextHost(MODELS["qwen3"]()), []
    host.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    host.logits(torch.full((1, 3), MASK), None, None, None)
    assert seen == [{"use_cache": False, "is_causal": False}]
