"""What tests of sessions share."""

import pytest

import accel.run_masks


@pytest.fixture
def looks(monkeypatch):
    """Every selection of blocks that is made, as (choices, layout)."""
    made = []
    select = accel.run_masks.site_mask

    def spy(choices, q, k, v, *, layout, **settings):
        made.append((choices, layout))
        return select(choices, q, k, v, layout=layout, **settings)

    monkeypatch.setattr(accel.run_masks, "site_mask", spy)
    return made
