"""From measurements to results: paired speed-ups, quality against dense, and the table of both."""

import json
from collections.abc import Sequence
from math import exp, log
from statistics import median
from typing import Any

import numpy as np

from accel.pipelines.compare_arms import DENSE, ArmSpec
from accel.pipelines.compare_book import Book, Job
from accel.pipelines.output import Output
from accel.records import DENSE_LABEL

# of every arm, prompt and round
Records = dict[tuple[ArmSpec, int, int], list[dict[str, Any]]]


def measure_quality(book: Book, arms: Sequence[ArmSpec], kind: Output, judge: Any) -> None:
    """Judge everything made that was not judged yet and whose dense counterpart is there."""
    for prompt in range(len(book.prompts)):
        dense = Job(DENSE, prompt, 0)
        if book.result(dense) is None:
            continue
        reference = None
        for arm in arms:
            if book.result(Job(arm, prompt, 0)) is None or book.quality(arm, prompt) is not None:
                continue
            if reference is None:
                reference = kind.load(book.video(DENSE, prompt))
            made = kind.load(book.video(arm, prompt))
            beside = None if arm == DENSE else reference
            quality = kind.judged(made, beside, book.prompts[prompt], judge)
            book.write_quality(arm, prompt, quality)


def records_of(book: Book, jobs: Sequence[Job]) -> Records:
    """What was measured of every arm, prompt and round: more than once of dense arms only."""
    found: Records = {}
    for job in jobs:
        record = book.result(job)
        if record is not None:
            found.setdefault((job.arm, job.prompt, job.round), []).append(record)
    return found


def fastest_of(records: Records, baselines: Sequence[ArmSpec]) -> ArmSpec:
    """The dense arm with the shortest paired times; the first where nothing is to be compared."""
    first = baselines[0]
    gains = {arm: _paired(records, arm, first)["speedup"] or 0.0 for arm in baselines[1:]}
    best = max(gains, key=gains.__getitem__, default=first)
    return best if gains.get(best, 0.0) > 1 else first


def results_of(
    book: Book,
    arm: ArmSpec,
    records: Records,
    baselines: Sequence[ArmSpec],
    fastest: ArmSpec,
    kind: Output,
) -> dict[str, Any]:
    """Everything measured of one arm; a field is None where nothing was measured for it.

    `speedup` and `predicted_speedup` are over `fastest`, `speedup_over` over each of the baselines.
    """
    done = [record for key, made in records.items() if key[0] == arm for record in made]
    found = {p: book.quality(arm, p) for p in range(len(book.prompts))}
    dense = [book.quality(DENSE, prompt) for prompt in found]
    by_prompt = {p: _of_prompt(records, arm, p) for p in found}
    start = (book.read(arm, "start") or {}) | (book.read(arm, "price") or {})
    summary = next((r["summary"] for r in reversed(done) if r["summary"]), None)
    predicted = start.get("predicted_speedup")
    if predicted is not None and fastest != DENSE:
        known = start["predicted_dense"].get(fastest.name)
        predicted = None if known is None else predicted / known
    result: dict[str, Any] = {
        "kind": arm.kind,
        "front": arm.front or None,
        "cache": json.loads(arm.cache) if arm.cache else None,
        "note": start.get("note", ""),
        "precision": arm.precision or None,
        "parameters": json.loads(arm.parameters) if arm.parameters else {},
        "predicted_speedup": predicted,
        "predicted_from": None if predicted is None else start.get("predicted_from"),
        "seconds": spread([r["seconds"] for r in done]),
        "step_seconds": {
            phase: middle([r["step_seconds"][phase] for r in done])
            for phase in ("all", "dense", "sparse")
        },
        "load_seconds": start.get("load_s"),
        "calibration_seconds": start.get("calibration_s"),
        "warm_up_seconds": start.get("warm_up_s"),
        "compile_seconds": start.get("compile_s"),
        "setup": json.loads(arm.setup) if arm.setup else {},
        "about": start.get("about") or {},
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in done), default=None),
        **kind.results(list(found.values()), dense, by_prompt),
        "keep": 1.0 if arm in baselines else keep_of(summary),
        "plan": start.get("plan"),
        "digest": start.get("digest"),
        "made_at": start.get("made_at"),
        "call": start.get("call"),
        "notices": {} if summary is None else summary["notices"],
        "summary": summary,
        kind.many: [_made_of(book, arm, prompt, found[prompt], kind.told) for prompt in found],
        "maps": _maps_of(book, arm),
    }
    over = {other.name: _paired(records, arm, other)["speedup"] for other in baselines}
    return result | {**_paired(records, arm, fastest), "speedup_over": over}


def dense_runs_of(records: Records, baselines: Sequence[ArmSpec]) -> dict[str, Any]:
    """By name of a dense arm, how its times spread: what a single pair may be off by.

    runs: how many there are; seconds: least, median and most; most_over_least: of those of one
    sitting, the largest; None where no sitting has two.
    """
    found = {}
    for arm in baselines:
        made = [record for key, of in records.items() if key[0] == arm for record in of]
        if not made:
            continue
        seconds = [record["seconds"] for record in made]
        sittings: dict[Any, list[float]] = {}
        for record in made:
            sittings.setdefault(record["sitting"], []).append(record["seconds"])
        ratios = [max(own) / min(own) for own in sittings.values() if len(own) > 1]
        found[arm.name] = {
            "runs": len(seconds),
            "seconds": {"least": min(seconds), "median": median(seconds), "most": max(seconds)},
            "most_over_least": max(ratios, default=None),
        }
    return found


def _paired(records: Records, arm: ArmSpec, baseline: ArmSpec) -> dict[str, Any]:
    """The speed-up of `arm` over `baseline`: median of the ratios of generations of the same job.

    Of an even number the geometric mean of the middle two, so that an arm is as much faster than
    another as that is slower. Pairs of one sitting are used where there are any; else pairs whose
    two sides were measured at different times, and the result says so.
    """
    pairs = []
    for (other_arm, prompt, number), made in records.items():
        others = records.get((baseline, prompt, number), []) if other_arm == arm else []
        for own in made:
            beside = [other for other in others if other["sitting"] == own["sitting"]]
            pairs += [(bool(beside), o["seconds"] / own["seconds"]) for o in (beside or others)[:1]]
    together = [ratio for same, ratio in pairs if same]
    used = together or [ratio for _, ratio in pairs]
    return {
        "speedup": exp(median(map(log, used))) if used else None,
        "pairs": len(used),
        "paired_in_one_sitting": bool(together),
    }


def _of_prompt(records: Records, arm: ArmSpec, prompt: int) -> list[dict[str, Any]]:
    return [r for key, made in records.items() if key[:2] == (arm, prompt) for r in made]


def _made_of(
    book: Book, arm: ArmSpec, prompt: int, quality: dict[str, Any] | None, told: Sequence[str]
) -> dict[str, Any] | None:
    """What was made of one prompt: its file in the comparison's folder and how it was judged; None
    if it was not.
    """
    if quality is None:
        return None
    file = book.video(arm, prompt).relative_to(book.folder).as_posix()
    return {"file": file, **{name: quality[name] for name in told if name in quality}}


def _maps_of(book: Book, arm: ArmSpec) -> dict[str, Any] | None:
    """What attention maps there are of this arm, and their file."""
    record = book.read(arm, "maps", 0)
    if record is None or not book.maps(arm).is_file():
        return None
    file = book.maps(arm).relative_to(book.folder).as_posix()
    return {
        "file": file,
        **{name: record[name] for name in ("step", "steps", "maps") if name in record},
    }


def keep_of(summary: dict[str, Any] | None) -> float | None:
    """Mean fraction of blocks computed over all calls of sparse steps."""
    rows = [] if summary is None else [r for r in summary["rows"] if r["phase"] != DENSE_LABEL]
    calls = sum(r["calls"] for r in rows)
    return sum(r["keep"] * r["calls"] for r in rows) / calls if calls else None


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median with the 20th and 80th percentile."""
    if not values:
        return None
    p20, p50, p80 = (float(p) for p in np.percentile(values, (20, 50, 80)))
    return {"median": p50, "p20": p20, "p80": p80}


def middle(values: Sequence[float | None]) -> float | None:
    """Median of what is there."""
    found = [v for v in values if v is not None]
    return median(found) if found else None
