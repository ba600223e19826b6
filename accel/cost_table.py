"""A latency table: what the parts of a sparse attention call cost, for one shape on one device.

Every entry is a ratio to the host's dense attention of the same shape, dtype and device, with its
spread. Between measured keeps a price is linear, and it never falls as more is kept: where a
measurement does, that is noise, and neighbours share their mean (isotonic regression).

The file is JSON, read as untrusted input. It names the device, the versions and the code that it
was measured with, and is refused elsewhere unless it is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from accel.errors import AccelError, PlanError
from accel.files import write_atomically
from accel.kernels.arguments import PRECISIONS, RESTS
from accel.origin import Origin, check_origin, origin_from_dict, read_json
from accel.plan import check_block
from accel.timing import quantile
from accel.untrusted import finite, table, typed

__all__ = ["KEEPS", "CostTable", "Price", "Shape", "isotonic"]

SCHEMA = 2
MAX_ENTRIES = 256
KEEPS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
SOURCES = ("measured", "roofline")


class Price(NamedTuple):
    """A ratio to a dense call, or milliseconds: median, and the quantiles at 0.2 and 0.8."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Price":
        values = list(samples)
        return cls(*(quantile(values, share) for share in (0.5, 0.2, 0.8)))

    @classmethod
    def known(cls, value: float) -> "Price":
        """Without a spread."""
        return cls(value, value, value)


FREE = Price.known(0.0)


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call: what a price depends on besides the choice."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    device: str
    block: tuple[int, int]
    precision: str = "full"
    batch: int = 1


@dataclass(frozen=True, slots=True)
class CostTable:
    """Prices of one shape.

    dense_ms: the host's dense call; sparse: "rest/ordered" -> price at each of `keeps`; select:
    work of an estimator -> price of one selection; dense: price of a dense call by accel's own
    kernel in the precisions and the block of dense recipes, whatever those of the shape are.
    again: work -> price of a later selection, which knows the log-sum-exp of the rows; only where
    the estimator finds it. mask: the block lists of one call, its blocks being known; recall: the
    look at how much of the mass is inside them; term: the blocks of one term of a pattern.
    source: `measured`, or `roofline`: computed from a data sheet (`accel.roofline`).
    """

    shape: Shape
    dense_ms: Price
    sparse: Mapping[str, tuple[Price, ...]]
    select: Mapping[str, Price]
    dense: Mapping[str, Price]
    keeps: tuple[float, ...] = KEEPS
    again: Mapping[str, Price] = field(default_factory=dict)
    mask: Price = FREE
    recall: Price = FREE
    term: Price = FREE
    source: str = "measured"
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        for name, row in self.sparse.items():
            if len(row) != len(self.keeps):
                raise AccelError(
                    f"sparse[{name!r}] has {len(row)} prices for {len(self.keeps)} keeps"
                )
        if list(self.keeps) != sorted(set(self.keeps)) or not 0 < self.keeps[0] <= 1:
            raise AccelError(f"keeps must ascend strictly in (0, 1], got {self.keeps}")
        if self.keeps[-1] != 1:
            raise AccelError(f"the last of the keeps must be 1, got {self.keeps[-1]}")

    @classmethod
    def of(
        cls,
        shape: Shape,
        dense_ms: float,
        sparse: Mapping[str, Sequence[float]],
        select: Mapping[str, float],
        dense: Mapping[str, float],
        **more: Any,
    ) -> "CostTable":
        """A table of plain numbers, without spread; `more` are fields as they are."""
        known = Price.known
        return cls(
            shape,
            known(dense_ms),
            {name: tuple(map(known, row)) for name, row in sparse.items()},
            {work: known(price) for work, price in select.items()},
            {word: known(price) for word, price in dense.items()},
            **more,
        )

    @property
    def own_dense(self) -> float:
        """Price of a dense call by accel's own kernel in the precision and block of the shape."""
        return self.price(1.0, "drop", False)

    def price(self, keep: float, rest: str, ordered: bool) -> float:
        """Price of a head that keeps `keep` of its blocks; it does not fall as `keep` grows."""
        name = f"{rest}/{'ordered' if ordered else 'natural'}"
        prices = isotonic([p.value for p in self.sparse[name]])
        if keep <= self.keeps[0]:
            # what is left there is mostly the fixed part of a row, so the price hardly falls
            return prices[0]
        steps = zip(self.keeps, self.keeps[1:], prices, prices[1:], strict=False)
        for low, high, a, b in steps:
            if keep <= high:
                # the last keep gives its price to the bit, and no rounding leads beyond it
                return b if keep == high else min(b, a + (b - a) * (keep - low) / (high - low))
        return prices[-1]

    def save(self, path: Path) -> None:
        data = {"schema": SCHEMA, **asdict(self)}
        write_atomically(path, json.dumps(data, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: Path, here: Origin | None = None, *, foreign: bool = False) -> "CostTable":
        """Read a table; every departure is an `AccelError` that names the file and the entry.

        here: this device, versions and code; a table of others is refused unless `foreign`.
        """
        data = read_json(path)
        try:
            found = cls.from_dict(data)
        except AccelError as error:
            raise AccelError(f"{path}: {error}") from error
        check_origin(path, found.origin, here, foreign)
        return found

    @classmethod
    def from_dict(cls, data: Any) -> "CostTable":
        """Read what `save` wrote, as untrusted input."""
        names = set(cls.__dataclass_fields__)
        data = dict(table("the table", data, names | {"schema"}, names | {"schema"}))
        if data.pop("schema") != SCHEMA:
            raise AccelError(f"this accel reads tables of schema {SCHEMA}; measure it again")
        values: dict[str, Any] = {n: _entry(n, data[n]) for n in ("mask", "recall", "term")}
        values["dense_ms"] = _entry("dense_ms", data["dense_ms"])
        for name in ("select", "dense", "again"):
            entries = _bounded(name, typed(name, data[name], dict))
            values[name] = {w: _entry(f"{name}[{w!r}]", p) for w, p in entries.items()}
        rows = _bounded("sparse", typed("sparse", data["sparse"], dict))
        values["sparse"] = {
            name: tuple(_entry(f"sparse[{name!r}]", p) for p in _bounded(name, row))
            for name, row in ((n, typed(f"sparse[{n!r}]", r, list)) for n, r in rows.items())
        }
        wanted = {f"{rest}/{order}" for rest in RESTS for order in ("natural", "ordered")}
        if set(values["sparse"]) != wanted:
            raise AccelError(f"sparse has the rows {sorted(rows)}, not {sorted(wanted)}")
        keeps = _bounded("keeps", typed("keeps", data["keeps"], list))
        if not keeps or not all(finite(k) for k in keeps):
            raise AccelError(f"keeps must be numbers, got {keeps!r:.80}")
        if data["source"] not in SOURCES:
            raise AccelError(f"source is one of {', '.join(SOURCES)}, got {data['source']!r:.80}")
        return cls(
            shape=_shape(data["shape"]),
            keeps=tuple(float(k) for k in keeps),
            source=data["source"],
            origin=origin_from_dict(data["origin"]),
            **values,
        )


def isotonic(values: Sequence[float]) -> list[float]:
    """The rising sequence nearest to `values` in least squares, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []  # mean, number of values
    for value in values:
        mean, number = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, number = (before * many + mean * number) / (many + number), many + number
        pools.append((mean, number))
    return [mean for mean, number in pools for _ in range(number)]


def _bounded(name: str, entries: Any) -> Any:
    if len(entries) > MAX_ENTRIES:
        raise AccelError(f"{name} has {len(entries)} entries, over {MAX_ENTRIES}")
    return entries


def _entry(name: str, value: Any) -> Price:
    if not isinstance(value, list) or len(value) != 3 or not all(finite(x) for x in value):
        raise AccelError(f"{name} must be three numbers (median, low, high), got {value!r:.80}")
    if not 0 <= value[1] <= value[0] <= value[2]:
        raise AccelError(f"{name} must have 0 <= low <= median <= high, got {value!r:.80}")
    return Price(*map(float, value))


def _shape(data: Any) -> Shape:
    names = set(Shape.__dataclass_fields__)
    data = dict(table("shape", data, names, names))
    for name in ("tokens", "heads", "head_dim", "batch"):
        if type(data[name]) is not int or data[name] < 1:
            raise AccelError(f"shape.{name} is a whole number from 1, got {data[name]!r:.80}")
    for name in ("dtype", "device", "precision"):
        typed(f"shape.{name}", data[name], str)
    if data["precision"] not in PRECISIONS:
        raise PlanError(f"shape.precision is one of {PRECISIONS}, got {data['precision']!r:.80}")
    return Shape(**{**data, "block": check_block(typed("shape.block", data["block"], list))})
