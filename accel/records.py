"""What a run did, site by site and phase by phase: calls, kept blocks, recall, kernel, time."""

import time
from dataclasses import dataclass, field

import torch

DENSE_LABEL = "dense"
CACHED_LABEL = "cached"  # calls of a text model that feed some tokens and see a cache


def phase_label(band: int | None) -> str:
    """How a phase is called in summaries: "dense", "band 0", "band 1", ..."""
    return DENSE_LABEL if band is None else f"band {band}"


@dataclass(slots=True)
class Record:
    """The calls of one site in one phase.

    keep: sum over calls of the fraction of blocks computed; recall: per head that keeps blocks,
    once for every mask and branch; seconds: one entry per call, of the attention alone;
    mask_seconds: one per mask that a call made; check_seconds: one per look at whether a mask is
    still good; recall_seconds: one per look at the recall of a mask; ratio: predicted price of a
    sparse call against the host's dense one, None where the plan predicts none for calls like
    these.
    """

    calls: int = 0
    keep: float = 0.0
    recall: list[torch.Tensor] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    mask_seconds: list[float] = field(default_factory=list)
    check_seconds: list[float] = field(default_factory=list)
    recall_seconds: list[float] = field(default_factory=list)
    exchange_seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    _events: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]] = field(
        default_factory=list
    )

    @property
    def all_mask_seconds(self) -> float:
        """What masks took: to make them, to look at their drift, and at their recall."""
        return sum(self.mask_seconds + self.check_seconds + self.recall_seconds, 0.0)

    def settle(self, *, wait: bool = True) -> None:
        """Turn pending CUDA events into seconds; without waiting, those that have passed."""
        pending = []
        for seconds, start, end in self._events:
            if wait:
                end.synchronize()
            elif not end.query():
                pending.append((seconds, start, end))
                continue
            seconds.append(start.elapsed_time(end) / 1000)
        self._events[:] = pending


class Stopwatch:
    """Times one attention call, or the making or checking of its mask, into a list of a record.

    Events on a CUDA device, the wall clock elsewhere.
    """

    __slots__ = ("_device", "_record", "_seconds", "_start")

    def __init__(self, record: Record, device: torch.device, into: str = "seconds") -> None:
        self._device = device
        self._record = record
        self._seconds: list[float] = getattr(record, into)
        self._start: float | torch.cuda.Event
        if device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record(torch.cuda.current_stream(device))
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        if isinstance(self._start, float):
            self._seconds.append(time.perf_counter() - self._start)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(self._device))
            self._record._events.append((self._seconds, self._start, end))
