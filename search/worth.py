"""What a plan is worth, by what a model is for."""

from dataclasses import asdict, dataclass

__all__ = ["Worth"]


@dataclass(frozen=True, slots=True)
class Worth:
    """What a plan was measured at over some tasks.

    time: its seconds over those of dense, in the mean over tasks; accuracy: what the tasks ask for
    that is right; agreement: share of the output that dense has too; calls: of the model, a task.
    """

    time: float
    accuracy: float
    agreement: float
    calls: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
