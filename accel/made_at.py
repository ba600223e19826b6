"""Where a plan was made: what to compare a run with that is at another place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accel.layout import Grid, as_grid


@dataclass(frozen=True, slots=True)
class MadeAt:
    """Grid, steps, dtype and device that a plan was made for; None where it does not say.

    device: the kind ("cpu", "cuda"); device_name: the card or the processor.
    """

    grid: Grid | None = None
    steps: int | None = None
    dtype: str | None = None
    device: str | None = None
    device_name: str | None = None

    @classmethod
    def of(
        cls, grid: Grid | None, expected: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "MadeAt":
        """Read from what a plan holds. Nobody vouches for it: what has another type is not said."""
        call = provenance.get("call")
        call = call if isinstance(call, Mapping) else {}
        before = provenance.get("made_at")
        if isinstance(before, Mapping):
            told = [before]
        else:
            of_call = {"grid": grid, "steps": call.get("num_inference_steps")}
            # in `expected` the device is a kind, in `provenance` a name
            told = [
                expected,
                {"dtype": provenance.get("dtype"), "device_name": provenance.get("device")},
                of_call,
            ]

        def first(key: str, kind: type) -> Any:
            values = (one.get(key) for one in told)
            return next((v for v in values if type(v) is kind and v), None)

        try:
            shape = as_grid(next(one["grid"] for one in told if one.get("grid")))
        except (StopIteration, ValueError):
            shape = None
        return cls(
            grid=shape,
            steps=first("steps", int),
            dtype=first("dtype", str),
            device=first("device", str),
            device_name=first("device_name", str),
        )

    def to_dict(self) -> dict[str, Any]:
        """What is said, as a table."""
        data = {name: value for name, value in asdict(self).items() if value is not None}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
