"""The images of flux-digits: deterministic, true to their prompts, one colour throughout."""

import pytest
import torch
from moving_digits import DIGIT_WORDS
from placed_digits import (
    CANVAS,
    PLACES,
    draw_placed_scene,
    make_image,
    parse_placed_prompt,
    placed_prompt,
    prompt_of_placed,
    render_placed,
    window_of,
)


def test_an_image_is_a_function_of_seed_and_index() -> None:
    first, prompt = make_image(3, 17)
    again, same_prompt = make_image(3, 17)
    other, _ = make_image(3, 18)
    assert prompt == same_prompt
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, CANVAS, CANVAS)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1


def test_prompts_name_digits_and_places_in_reading_order() -> None:
    counts = set()
    for index in range(40):
        scene = draw_placed_scene(2, index)
        asked = parse_placed_prompt(prompt_of_placed(scene))
        assert asked == [(d.digit, d.place) for d in scene.digits]
        assert placed_prompt(asked) == prompt_of_placed(scene)
        numbers = [[*PLACES].index(place) for _, place in asked]
        assert numbers == sorted(set(numbers))
        counts.add(len(asked))
    assert counts == {1, 2, 3, 4}
    prompt = "a seven top left and an eight bottom right"
    assert parse_placed_prompt(prompt) == [(7, "top left"), (8, "bottom right")]
    assert DIGIT_WORDS[7] == "seven"


@pytest.mark.parametrize("index", range(8))
def test_digits_stand_inside_the_windows_of_their_places(index: int) -> None:
    scene = draw_placed_scene(4, index)
    bright = render_placed(scene).amax(0) / 2 + 0.5 > 0.7
    seen = torch.zeros(CANVAS, CANVAS, dtype=torch.bool)
    for digit in scene.digits:
        top, left, bottom, right = window_of(digit.place)
        assert bright[top:bottom, left:right].sum() > 100
        seen[top:bottom, left:right] = True
    assert not (bright & ~seen).any()


def test_windows_of_places_do_not_meet() -> None:
    seen = torch.zeros(CANVAS, CANVAS)
    for place in PLACES:
        top, left, bottom, right = window_of(place)
        seen[top:bottom, left:right] += 1
    assert seen.max() == 1


def test_all_digits_of_an_image_have_its_colour() -> None:
    scene = next(s for s in (draw_placed_scene(5, i) for i in range(40)) if len(s.digits) == 4)
    image = render_placed(scene) / 2 + 0.5
    for digit in scene.digits:
        top, left, bottom, right = window_of(digit.place)
        window = image[:, top:bottom, left:right].flatten(1)
        found = window[:, window.amax(0) > 0.99].T
        expected = torch.tensor([scene.colour]).expand_as(found)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)  # edges are mixed
