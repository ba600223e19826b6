"""The training loop: as long as it is told, and the same again after a kill."""

from pathlib import Path

import pytest
import torch
from training import Length, Run


class Killed(Exception):
    """What ends a run in the middle."""


def train(
    folder: Path, length: Length, die_at: int | None = None
) -> tuple[dict, torch.Tensor, list]:
    """A stage that fits one weight to data of its index; progress as it was seen in every step."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen = []

    def step(index: int, progress: float) -> dict[str, float]:
        if index == die_at:
            raise Killed
        seen.append(progress)
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(index))
        loss = (model(x) - progress).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss.item()}

    parts = {"model": model, "optimiser": optimiser}
    done = Run(folder, 0).stage("fit", length, parts, step, checkpoint_minutes=0.0)
    return done, model.weight.detach().clone(), seen


def test_a_length_in_steps_gives_the_same_weights_again_and_after_a_kill(tmp_path: Path) -> None:
    length = Length(minutes=0.0, steps=8)
    done, weight, seen = train(tmp_path / "one", length)
    assert done["steps"] == 8
    assert seen == [i / 8 for i in range(8)]
    with pytest.raises(Killed):
        train(tmp_path / "two", length, die_at=5)
    done, again, seen = train(tmp_path / "two", length)
    assert seen == [i / 8 for i in range(5, 8)]
    assert torch.equal(again, weight)
    assert done["steps"] == 8


@pytest.mark.parametrize(
    ("length", "done", "progress"),
    [
        (Length(2.0), {"steps": 9, "seconds": 30.0}, 0.25),
        (Length(2.0, steps=12), {"steps": 9, "seconds": 30.0}, 0.75),
        (Length(2.0), {"steps": 9, "seconds": 300.0}, 1.0),
        (Length(0.0), {"steps": 0, "seconds": 0.0}, 1.0),
    ],
)
def test_progress_is_by_the_clock_or_by_steps(length: Length, done: dict, progress: float) -> None:
    assert length.progress(done) == progress


def test_the_last_phase_has_whole_videos_and_no_bias() -> None:
    from wan_digits_denoiser import DenoiserSettings

    phases = DenoiserSettings().phases
    assert [p.until for p in phases] == sorted(p.until for p in phases)
    assert phases[-1].until == 1.0
    assert 17 in [clips.frames for clips in phases[-1].clips]
    assert all(clips.digit_weight == 0 for clips in phases[-1].clips)
