"""What is measured of a case: `KERNELS` says for every kernel who is timed, and in which parts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from accel.dense import dense_attentions
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.attention import resolve_backend
from accel.kernels.block_mass import block_mass
from accel.pipelines.bench.case import BenchSettings, Block, Case, Part
from accel.pipelines.bench.contest import Rival, Run, contest
from accel.pipelines.bench.gate import Gate, attention_gate, mass_gate
from accel.pipelines.bench.inputs import (
    Inputs,
    inputs_of,
    per_head_order,
    random_mask,
    token_pairs,
)
from accel.pipelines.bench.results import Row, measured
from accel.pipelines.bench.rivals import sparse_rivals
from accel.pipelines.host import DTYPES


class Setup(NamedTuple):
    """A contest. rivals: by backend and mode; gate: their check; work: operations that are needed,
    as a share of those of dense attention; kept: share of the token pairs, where that is what a
    kernel leaves out.
    """

    rivals: Mapping[tuple[str, str], Rival]
    gate: Gate
    work: float = 1.0
    kept: float | None = None


class Bench:
    """One case on its device: inputs that all its kernels are measured on."""

    def __init__(self, case: Case, settings: BenchSettings) -> None:
        self.case, self.settings = case, settings
        self.inputs: list[Inputs] = inputs_of(case, settings.device)
        self.dense = dense_attentions(settings.device, DTYPES[case.dtype])
        self.pairs = case.batch * case.heads * case.tokens**2
        # what was compiled for other shapes counts against torch's limit of recompilations
        torch.compiler.reset()

    def rows(self, kernel: str, part: Part, known: Sequence[Row]) -> list[Row]:
        """What a kernel gives in one part. known: rows of this case, which are not measured again;
        the fastest dense one of them is the baseline of all but the dense ones.
        """
        setup = KERNELS[kernel].setup(self, part)
        there = {(row.backend, row.mode) for row in known if row.of(kernel, self.case, part)}
        rivals = {name: rival for name, rival in setup.rivals.items() if name not in there}
        baseline = None if kernel == "dense" else fastest(known)
        dense = None if baseline is None else self.dense[baseline]
        outcomes = contest(rivals, setup.gate, self.inputs, self.settings, dense)
        rows = [
            Row(
                kernel=kernel,
                backend=backend,
                mode=mode,
                **asdict(self.case),
                **part._asdict(),
                kept=1.0 if setup.kept is None else setup.kept,
                **measured(outcome, 4 * self.case.dim * self.pairs * setup.work),
                efficiency=_ratio(setup.kept, outcome.price),
                baseline=baseline or "",
            )
            for (backend, mode), outcome in outcomes.items()
        ]
        if kernel == "dense":
            return _priced([*(row for row in known if row.kernel == "dense"), *rows])
        return [_against_itself(row, [*known, *rows]) for row in rows]


@dataclass(frozen=True, slots=True)
class Kernel:
    """What the benchmark knows of a kernel. parts: what is measured one after the other; setup: a
    contest of one of them; mass: it looks at every block, and has no keep.
    """

    setup: Callable[[Bench, Part], Setup]
    parts: Callable[[BenchSettings], list[Part]]
    mass: bool = False


def _dense(bench: Bench, _: Part) -> Setup:
    """Every dense attention of others that the device may have."""
    gate = attention_gate(bench.inputs[0], None, bench.settings.checked_rows)
    rivals = {(name, "full"): Rival(partial(_given, run)) for name, run in bench.dense.items()}
    return Setup(rivals, gate)


def _attention(bench: Bench, part: Part) -> Setup:
    """Block-sparse attention of every backend and precision."""
    settings, case = bench.settings, bench.case
    assert part.block is not None
    mask = random_mask(case, part.block, part.keep, part.rows, settings.device)
    kept = case.batch * token_pairs(mask) / bench.pairs
    order = per_head_order(case, settings.device) if settings.order == "per_head" else None
    rivals = sparse_rivals(settings, mask, bench.inputs[0][0], order)
    gate = attention_gate(
        bench.inputs[0], mask, settings.checked_rows, order=order, rest=settings.rest
    )
    return Setup(rivals, gate, kept, kept)


def _block_mass(bench: Bench, part: Part) -> Setup:
    """The exact mass of every block: in two passes, and in one with a known log-sum-exp."""
    assert part.block is not None
    block, backend = part.block, resolve_backend("auto", bench.settings.device)

    def known_mass() -> Run:
        known = {q.data_ptr(): block_mass(q, k, block=block)[1] for q, k, _ in bench.inputs}
        return partial(_mass, block, known)

    rivals = {
        (backend, "two passes"): Rival(lambda: partial(_mass, block, {})),
        (backend, "known lse"): Rival(known_mass),
    }
    # one product of queries and keys, where attention takes two
    return Setup(rivals, mass_gate(bench.inputs[0], block), 1 / 2)


def _antidiagonal(bench: Bench, part: Part) -> Setup:
    """The mass of every block in a map `stride` times coarser."""
    assert part.block is not None
    block, stride = part.block, bench.settings.stride
    name = (resolve_backend("auto", bench.settings.device), f"stride {stride}")
    rivals = {name: Rival(lambda: partial(_scores, block, stride))}
    return Setup(rivals, mass_gate(bench.inputs[0], block, stride), 1 / (2 * stride))


def _whole(_: BenchSettings) -> list[Part]:
    return [Part()]


def _masks(settings: BenchSettings) -> list[Part]:
    return [Part(block, *mask) for block in settings.blocks for mask in settings.masks]


def _blocks(settings: BenchSettings) -> list[Part]:
    return [Part(block) for block in settings.blocks]


KERNELS = {
    "dense": Kernel(_dense, _whole),
    "attention": Kernel(_attention, _masks),
    "block_mass": Kernel(_block_mass, _blocks, mass=True),
    "antidiagonal": Kernel(_antidiagonal, _blocks, mass=True),
}
# what `kernel` may ask for; dense attention comes with all of them
CHOICES = tuple(name for name in KERNELS if name != "dense")


def fastest(rows: Iterable[Row]) -> str | None:
    """The backend of the fastest dense row; None where none was timed."""
    timed = {row.backend: row.ms["median"] for row in rows if row.ms and row.kernel == "dense"}
    return min(timed, key=timed.__getitem__) if timed else None


def _priced(rows: list[Row]) -> list[Row]:
    """Dense rows as multiples of the fastest of them."""
    best = fastest(rows)
    if best is None:
        return rows
    usual = {row.backend: row.ms["median"] if row.ms else None for row in rows}
    return [
        replace(row, baseline=best, price=_ratio(usual[row.backend], usual[best])) for row in rows
    ]


def _against_itself(row: Row, rows: Iterable[Row]) -> Row:
    """A row with its efficiency over the same rival with every block kept."""
    if row.efficiency is None:
        return row
    name = (row.kernel, row.backend, row.mode, row.block)
    whole = [
        other.price
        for other in rows
        if other.kept == 1 and (other.kernel, other.backend, other.mode, other.block) == name
    ]
    price = next((price for price in whole if price is not None), None)
    return replace(row, own_efficiency=_ratio(price, row.price, row.kept))


def _given(run: Run) -> Run:
    return run


def _mass(block: Block, known: dict[int, Tensor], q: Tensor, k: Tensor, _: Tensor) -> Tensor:
    return block_mass(q, k, block=block, lse=known.get(q.data_ptr()))[0]


def _scores(block: Block, stride: int, q: Tensor, k: Tensor, _: Tensor) -> Tensor:
    return antidiagonal_scores(q, k, block=block, stride=stride)


def _ratio(above: float | None, below: float | None, factor: float = 1.0) -> float | None:
    return None if above is None or below is None else factor * above / below
