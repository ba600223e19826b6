"""What prices come from: this device, measured; a table made elsewhere; or a GPU's data sheet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.errors import AccelError
from accel.untrusted import finite, table

__all__ = ["HERE", "CostSource", "Hardware"]

# what tensor cores and vector units may be asked for; a device may lack the last two
ARITHMETIC = ("float32", "float16", "bfloat16", "int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A GPU by its data sheet, and what programs reach of it.

    tflops: peak of products by the type of their operands, dense (data sheets lead with twice that,
    for operands of which half are zeros); bandwidth_gb_s: of its memory; launch_us: what starting
    a kernel takes. Assumed, not measured: the parts of the peak that the host's dense attention
    (dense), accel's kernels (kernel) and linear layers (linear) reach.
    """

    name: str
    sheet: str
    tflops: Mapping[str, int | float]
    bandwidth_gb_s: int | float
    launch_us: int | float = 5.0
    dense: int | float = 0.6
    kernel: int | float = 0.45
    linear: int | float = 0.7

    def __post_init__(self) -> None:
        rates = dict(table("hardware.tflops", self.tflops, set(ARITHMETIC), {"float32"}))
        object.__setattr__(self, "tflops", rates)
        numbers = {f"tflops.{word}": value for word, value in rates.items()}
        for name in ("bandwidth_gb_s", "launch_us", "dense", "kernel", "linear"):
            numbers[name] = getattr(self, name)
        for name, value in numbers.items():
            most = 1.0 if name in ("dense", "kernel", "linear") else float("inf")
            if not finite(value) or not 0 < value <= most:
                limit = "in (0, 1]" if most == 1 else "above 0"
                raise AccelError(f"hardware.{name} is a number {limit}, got {value!r:.80}")
        for name in ("name", "sheet"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise AccelError(f"hardware.{name} is a text, got {getattr(self, name)!r:.80}")

    def rate(self, *operands: str) -> float:
        """Peak operations in a second with the first of these types that the device multiplies."""
        for word in operands:
            if word in self.tflops:
                return self.tflops[word] * 1e12
        raise AccelError(
            f"hardware {self.name!r} has no tflops of {' or '.join(operands)}; it has"
            f" {', '.join(self.tflops)}: add what its data sheet says, or take a model.dtype or"
            " precisions that it multiplies"
        )


@dataclass(frozen=True, slots=True)
class CostSource:
    """hardware: prices are computed for it; table: a folder with the baseline and the tables that a
    run elsewhere made, or one table; with neither, this device is measured. foreign: take what is
    of other devices or versions.
    """

    hardware: Hardware | None = None
    table: str | None = None
    foreign: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "CostSource":
        """An entry of `configs/hardware`; its name is `auto` where this device is meant."""
        known = {"table", "foreign", *Hardware.__dataclass_fields__}
        config = dict(table("hardware", config, known, {"name"}))
        path, foreign = config.pop("table", None), config.pop("foreign", False)
        if path is not None and (not isinstance(path, str) or not path):
            raise AccelError(f"hardware.table is a folder of tables, or null, got {path!r:.80}")
        if not isinstance(foreign, bool):
            raise AccelError(f"hardware.foreign is true or false, got {foreign!r:.80}")
        if foreign and path is None:
            raise AccelError("hardware.foreign is about hardware.table, which is not given")
        if config["name"] == "auto":
            others = sorted(set(config) - {"name"})
            if others:
                raise AccelError(
                    f"hardware=auto is measured; leave out {', '.join(others)}, or give the device"
                    " a name"
                )
            return cls(None, path, foreign)
        missing = sorted({"sheet", "tflops", "bandwidth_gb_s"} - set(config))
        if missing:
            raise AccelError(f"hardware {config['name']!r:.80} lacks {', '.join(missing)}")
        return cls(Hardware(**config), path, foreign)


HERE = CostSource()
