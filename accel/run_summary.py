"""What a run did against what was asked and predicted, as a table and as a value."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from accel.head_shares import Dealt
from accel.records import CACHED_LABEL, DENSE_LABEL, Record
from accel.router import Session

HEAD = (
    *("site", "phase", "calls", "keep", "recall", "worst", "kernel"),
    *("ms", "+ masks", "predicted"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One site in one phase.

    keep: mean fraction of blocks computed; recall: softmax mass inside them (mean, and the worst
    head), on sampled rows, as the masks were found, of heads that a kernel computes; kernels: none
    where something stands in for every head; call_ms: median time of one attention call, without
    its mask, with what ranks exchange for it, 0 where it was not timed (a compiled block); mask_s:
    seconds spent on making masks and looking at their drift and their recall; total_s: seconds of
    masks and calls together; predicted_ms: of one call with its part in the making of masks, the
    plan's predicted ratio times this run's dense call; None without either, and for calls of
    another length, device or precision than predicted.
    """

    site: str
    phase: str
    calls: int
    keep: float
    recall: float | None
    worst_recall: float | None
    kernels: tuple[str, ...]
    call_ms: float
    mask_s: float
    total_s: float
    predicted_ms: float | None

    @property
    def mask_ms(self) -> float:
        """What the making of masks adds to a call, in the mean over calls."""
        return self.mask_s * 1000 / self.calls


@dataclass(frozen=True, slots=True)
class Summary:
    """The last run of an enabled pipeline. `str` gives a table.

    dealt: where ranks shared the heads of sparse calls, how, by site and phase; keeps and recall
    are then those of this rank's heads.
    cache_bytes: the most that the keys and values of a text model's cache took.
    """

    plan: str
    rows: tuple[Row, ...]
    notices: dict[str, int]
    left: tuple[str, ...]
    dealt: Mapping[tuple[str, str], Dealt] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def predicted_over_measured(self) -> float | None:
        """Predicted over measured time of all sparse attention calls; None without prediction.

        Both with the making of masks. Measured calls count by their median, so that a first call
        that compiles does not decide.
        """
        priced = [r for r in self.rows if r.predicted_ms is not None and r.phase != DENSE_LABEL]
        measured = sum((r.call_ms + r.mask_ms) * r.calls for r in priced)
        predicted = sum((r.predicted_ms or 0.0) * r.calls for r in priced)
        return predicted / measured if measured else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "rows": [
                {name: getattr(row, name) for name in Row.__dataclass_fields__} for row in self.rows
            ],
            "notices": self.notices,
            "left": list(self.left),
            "predicted_over_measured": self.predicted_over_measured,
            "cache_bytes": self.cache_bytes,
            "dealt": [
                {"site": site, "phase": phase, **asdict(dealt)}
                for (site, phase), dealt in self.dealt.items()
            ],
        }

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [HEAD]
        for r in self.rows:
            table.append(
                (
                    r.site,
                    r.phase,
                    str(r.calls),
                    f"{r.keep:.3f}",
                    _number(r.recall, ".3f"),
                    _number(r.worst_recall, ".3f"),
                    "+".join(r.kernels) or "-",
                    _number(r.call_ms or None, ".1f"),
                    _number(r.call_ms + r.mask_ms or None, ".1f"),
                    _number(r.predicted_ms, ".1f"),
                )
            )
        widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
        lines = [f"plan {self.plan!r}"]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        if self.left:
            lines.append(f"left dense by the plan: {', '.join(self.left)}")
        if self.cache_bytes:
            lines.append(
                f"keys and values in the cache: {self.cache_bytes / 2**20:.1f} MiB at most"
            )
        if self.dealt:
            lines.append(_told(list(self.dealt.values())))
        lines += [f"ran dense {count} times: {why}" for why, count in self.notices.items()]
        ratio = self.predicted_over_measured
        if ratio is not None:
            lines.append(f"sparse attention: predicted / measured time = {ratio:.2f}")
        return "\n".join(lines)


def _band(phase: str) -> int:
    if phase in (DENSE_LABEL, CACHED_LABEL):
        return -1 if phase == DENSE_LABEL else sys.maxsize
    return int(phase.split()[1])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _told(dealt: Sequence[Dealt]) -> str:
    """How much the slowest rank has to do, in the worst of the deals and in the middle one."""
    own, neighbours = ([getattr(d, name) for d in dealt] for name in ("imbalance", "neighbours"))
    return (
        f"heads dealt to {dealt[0].ranks} ranks, these are those of rank {dealt[0].rank}: the"
        f" slowest has {max(own):.2f} times the mean at most ({median(own):.2f} in the median;"
        f" shards of neighbouring heads: {max(neighbours):.2f} and {median(neighbours):.2f})"
    )


def _row(session: Session, site: str, phase: str, record: Record) -> Row:
    record.settle()
    dense = session.records.get((site, DENSE_LABEL))
    predicted = None
    if dense is not None and dense.seconds and record.ratio is not None:
        predicted = median(dense.seconds) * 1000 / session.plan.dense_ratio(site) * record.ratio
    recalls = [r.cpu() for r in record.recall if len(r)]
    return Row(
        site=site,
        phase=phase,
        calls=record.calls,
        keep=record.keep / record.calls,
        recall=sum(float(r.mean()) for r in recalls) / len(recalls) if recalls else None,
        worst_recall=min(float(r.min()) for r in recalls) if recalls else None,
        kernels=tuple(sorted(record.kernels)),
        call_ms=(median(record.seconds or [0.0]) + median(record.exchange_seconds or [0.0])) * 1000,
        mask_s=record.all_mask_seconds,
        total_s=sum(record.seconds + record.exchange_seconds) + record.all_mask_seconds,
        predicted_ms=predicted,
    )


def summarise(sessions: Sequence[Session]) -> Summary:
    """The summary of the sessions of one pipeline, in the order of their sites."""
    rows: list[Row] = []
    notices: dict[str, int] = {}
    left: list[str] = []
    dealt: dict[tuple[str, str], Dealt] = {}
    for number, session in enumerate(sessions):
        mark = f"#{number + 1}." if len(sessions) > 1 else ""
        order = {s.name: i for i, s in enumerate(session.geometry.sites)}
        keys = sorted(
            # a call that was interrupted left a record without an entry
            (key for key, record in session.records.items() if record.calls),
            key=lambda key: (order[key[0]], _band(key[1])),
        )
        for site, phase in keys:
            row = _row(session, site, phase, session.records[site, phase])
            rows.append(row if not mark else _marked(row, mark))
        for why, count in session.notices.items():
            notices[why] = notices.get(why, 0) + count
        left += [mark + s for s in order if s not in session.plan.sites]
        dealt |= {(mark + site, phase): d for (site, phase), d in session.shared.dealt.items()}
    held = sum(session.run.token_bytes for session in sessions)
    return Summary(sessions[0].plan.name, tuple(rows), notices, tuple(left), dealt, held)


def _marked(row: Row, mark: str) -> Row:
    values = {name: getattr(row, name) for name in Row.__dataclass_fields__}
    return Row(**{**values, "site": mark + row.site})
