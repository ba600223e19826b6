import torch
import torch.nn.functional as F

from accel.key_padding import KeyPadding, valid_of

VALID = torch.tensor([[True, True, False, False], [True, False, False, False]])


def test_masks_of_keys_are_told_from_others():
    keys = VALID[:, None, None]
    assert torch.equal(valid_of(keys, 2, 4), VALID)
    assert torch.equal(valid_of(keys[:1], 3, 4), VALID[:1].expand(3, 4))
    assert valid_of(keys.float(), 2, 4) is None
    assert valid_of(VALID[:, None, None].expand(2, 1, 4, 4), 2, 4) is None
    assert valid_of(keys, 2, 5) is None
    assert valid_of(VALID, 2, 4) is None


def test_it_goes_through_what_would_make_a_matrix():
    """The lines of HunyuanVideo 1.5's processor."""
    mask = KeyPadding.pad(KeyPadding(VALID), (7 - KeyPadding(VALID).shape[1], 0), value=True)
    rows = mask.bool().view(2, 1, 1, 7).repeat(1, 1, 7, 1)
    both = (rows & rows.transpose(2, 3)).bool()
    assert both.mask.shape == (2, 1, 1, 7)
    assert torch.equal(both.mask[:, 0, 0], F.pad(VALID, (3, 0), value=True))


def test_tensors_are_padded_as_ever():
    assert torch.equal(KeyPadding.pad(VALID, (1, 0)), F.pad(VALID, (1, 0)))
