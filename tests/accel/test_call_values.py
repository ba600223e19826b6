import pytest
import torch

from accel.call_values import Packed, pack, unpack

X, Y = torch.zeros(2), torch.ones(3)


@pytest.mark.parametrize(
    ("value", "shape", "back"),
    [
        ([X, None, 3], "(T-N)", (X, None, 3)),
        ([[(1, 4, 5), (1, 2, 3)], X], "(((NNN)(NNN))T)", (((1, 4, 5), (1, 2, 3)), X)),
        ([[X, Y], "text", 0.5, True, {}], "((TT)----)", ((X, Y), None, None, None, None)),
        ([], "()", ()),
    ],
)
def test_what_is_packed_comes_back(value, shape, back):
    packed = pack(value)
    assert packed.shape == shape
    found = unpack(packed)
    assert str(found) == str(back)
    assert unpack(Packed(*packed)) is not None


def test_tensors_are_the_same_ones():
    first, second = unpack(pack([X, [Y]]))
    assert first is X
    assert second[0] is Y
