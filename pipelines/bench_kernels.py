"""What is measured of a case, kernel by kernel: every method yields rows as they are done."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accel.dense import dense_attentions
from accel.kernels.antidiagonal import antidiagonal_scores
from accel.kernels.attention import resolve_backend
from accel.kernels.block_mass import block_mass
from accel.pipelines.bench_contest import Outcome, Rival, Run, contest
from accel.pipelines.bench_gate import attention_gate, mass_gate
from accel.pipelines.bench_inputs import Inputs, inputs_of, random_mask, token_pairs
from accel.pipelines.bench_results import Row, measured
from accel.pipelines.bench_rivals import sparse_rivals
from accel.pipelines.bench_settings import BenchSettings, Block, Case
from accel.pipelines.host import DTYPES


class Bench:
    """One case on its device: inputs that all its kernels are measured on."""

    def __init__(self, case: Case, settings: BenchSettings) -> None:
        self.case, self.settings = case, settings
        self.inputs: list[Inputs] = inputs_of(case, settings.device)
        self._dense = dense_attentions(settings.device, DTYPES[case.dtype])
        self._pairs = case.batch * case.heads * case.tokens**2

    def rows(self, kernel: str, baseline: str) -> Iterator[list[Row]]:
        """What a kernel gives. baseline: the fastest of the dense ones, which come without."""
        makers = {
            "attention": self.attention,
            "block_mass": self.block_mass,
            "antidiagonal": self.antidiagonal,
        }
        return self.dense() if kernel == "dense" else makers[kernel](baseline)

    def dense(self) -> Iterator[list[Row]]:
        """Every dense attention of others that this device may have."""
        rivals = _rivals(self._dense)
        gate = attention_gate(self.inputs[0], None, self.settings.checked_rows)
        outcomes = contest(rivals, gate, self.inputs, self.settings, None)
        rows = [self._row("dense", name, "full", outcome) for name, outcome in outcomes.items()]
        best = fastest(rows)
        if best is not None:
            usual = {row.backend: row.ms["median"] if row.ms else None for row in rows}
            rows = [
                replace(row, baseline=best, price=_ratio(usual[row.backend], usual[best]))
                for row in rows
            ]
        yield rows

    def attention(self, baseline: str) -> Iterator[list[Row]]:
        """Block-sparse attention of every backend and precision, mask by mask."""
        whole: dict[tuple[str, str, Block], float] = {}
        # what was compiled for other shapes counts against torch's limit of recompilations
        torch.compiler.reset()
        for block in self.settings.blocks:
            for keep, kind in self.settings.masks:
                mask = random_mask(self.case, block, keep, kind, self.settings.device)
                kept = self.case.batch * token_pairs(mask) / self._pairs
                rivals = {
                    (backend, precision): Rival(partial(make, mask, self.inputs[0][0]), precision)
                    for (backend, precision), make in sparse_rivals(self.settings).items()
                }
                gate = attention_gate(self.inputs[0], mask, self.settings.checked_rows)
                rows = []
                for (backend, precision), outcome in self._contest(rivals, gate, baseline).items():
                    name = (backend, precision, block)
                    if kept == 1 and outcome.price is not None:
                        whole[name] = outcome.price
                    row = self._row(
                        "attention",
                        backend,
                        precision,
                        outcome,
                        work=kept,
                        keep=keep,
                        kept=kept,
                        rows=kind,
                        block=block,
                        baseline=baseline,
                        efficiency=_ratio(kept, outcome.price),
                        own_efficiency=_ratio(whole.get(name), outcome.price, kept),
                    )
                    rows.append(row)
                yield rows

    def block_mass(self, baseline: str) -> Iterator[list[Row]]:
        """The exact mass of every block: in two passes, and in one with a known log-sum-exp."""
        for block in self.settings.blocks:
            rivals = {
                "two passes": Rival(partial(_given, partial(_mass, block, {}))),
                "known lse": Rival(partial(self._known_mass, block)),
            }
            outcomes = self._contest(rivals, mass_gate(self.inputs[0], block), baseline)
            yield self._of_blocks("block_mass", outcomes, block, 1, baseline)

    def antidiagonal(self, baseline: str) -> Iterator[list[Row]]:
        """The mass of every block in a map `stride` times coarser."""
        stride = self.settings.stride
        for block in self.settings.blocks:
            rivals = _rivals({f"stride {stride}": partial(_antidiagonal, block, stride)})
            gate = mass_gate(self.inputs[0], block, stride)
            outcomes = self._contest(rivals, gate, baseline)
            yield self._of_blocks("antidiagonal", outcomes, block, stride, baseline)

    def _known_mass(self, block: Block) -> Run:
        known = {q.data_ptr(): block_mass(q, k, block=block)[1] for q, k, _ in self.inputs}
        return partial(_mass, block, known)

    def _of_blocks(
        self,
        kernel: str,
        outcomes: Mapping[str, Outcome],
        block: Block,
        stride: int,
        baseline: str,
    ) -> list[Row]:
        """Rows of a kernel that gives a number for every block, from cells of `stride` tokens."""
        # one product of queries and keys, where attention takes two
        work = 1 / (2 * stride)
        backend = resolve_backend("auto", self.settings.device)
        return [
            self._row(kernel, backend, mode, outcome, work=work, block=block, baseline=baseline)
            for mode, outcome in outcomes.items()
        ]

    def _contest(self, rivals, gate, baseline):
        return contest(rivals, gate, self.inputs, self.settings, self._dense[baseline])

    def _row(
        self, kernel: str, backend: str, mode: str, outcome: Outcome, work: float = 1.0, **more: Any
    ) -> Row:
        """work: operations that are needed, as a share of those of dense attention."""
        return Row(
            kernel=kernel,
            backend=backend,
            mode=mode,
            **asdict(self.case),
            **measured(outcome, 4 * self.case.dim * self._pairs * work),
            **more,
        )


def fastest(rows: Iterable[Row]) -> str | None:
    """The backend of the fastest row; None where none was timed."""
    timed = {row.backend: row.ms["median"] for row in rows if row.ms}
    return min(timed, key=timed.__getitem__) if timed else None


def _rivals(runs: Mapping[str, Run]) -> dict[str, Rival]:
    return {name: Rival(partial(_given, run)) for name, run in runs.items()}


def _given(run: Run) -> Run:
    return run


def _mass(block: Block, known: dict[int, Tensor], q: Tensor, k: Tensor, _: Tensor) -> Tensor:
    return block_mass(q, k, block=block, lse=known.get(q.data_ptr()))[0]


def _antidiagonal(block: Block, stride: int, q: Tensor, k: Tensor, _: Tensor) -> Tensor:
    return antidiagonal_scores(q, k, block=block, stride=stride)


def _ratio(above: float | None, below: float | None, factor: float = 1.0) -> float | None:
    return None if above is None or below is None else factor * above / below
