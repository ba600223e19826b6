"""The trials of a search: an Optuna study that survives its workers.

Every worker asks for a genome, evaluates it in its own process, and tells the result; the storage
is all they share. What is asked depends on the storage and the seed alone, not on a random state
that a process takes with it: a search that was killed and goes on finds what it would have found.

* A trial whose worker is gone is taken over under its own number: nothing is lost or moved. Of a
  worker on this machine the process tells; one on another machine has a heart that beats into the
  storage while it evaluates, and is gone when that was not seen to beat for a while. The while is
  by the clock of who looks: clocks of machines need not agree.
* The first generation is enqueued when the study is made. A trial that was enqueued has no
  generation unless the sampler is asked for it, and would never become a parent.
* Children are made by `Genes.child` from the winner of a tournament among the parents that NSGA-II
  selected and one of about the same time (parents from the two ends of a front have children far
  behind it). They are moved by `repair` to where they are feasible, and drawn again while they are
  known. One that is known all the same is answered with the value that it had.
* Trials are claimed one at a time, where workers see one file system. Those of one storage without
  one may end a study with a trial more than was wanted.

Uses a few names of Optuna that are not public, for each of which there is a test: the id of a trial
(`_trial_id`), by which a trial is taken over, and `get_trial_generation` of its samplers.
"""

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import NSGAIISampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from accel.errors import AccelError
from accel.search.genome import Genome

try:
    import fcntl
except ImportError:  # not on Windows: there, one worker
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 200  # children drawn before one that is known is taken
BEAT_S = 30.0
STALE_S = 600.0  # a worker of another machine whose heart does not beat for so long is gone
UNSIGNED_S = 10.0  # a claim that nobody has signed for so long was not finished
WAIT_S = 0.5
MATES = 4  # parents of the nearest times, the winner itself among them

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
DIRECTIONS = (MINIMIZE, MAXIMIZE)  # time, quality


@runtime_checkable
class Genes(Protocol):
    """What a study has to know of genes: `accel.search.genome` and `text_genes` have them."""

    @property
    def sizes(self) -> dict[str, int]: ...

    def to_params(self, genome: Genome) -> dict[str, int]: ...

    def from_params(self, params: Mapping[str, int]) -> Genome: ...

    def random(self, rng: Random) -> Genome: ...

    def child(self, one: Genome, other: Genome, rng: Random) -> Genome: ...


@dataclass(frozen=True, slots=True)
class Done:
    """A finished trial. values: time as a fraction of the host's dense, quality in dB (of a text,
    the share that is right), and a third objective where there is one: peak memory in bytes, or of
    a text the share of tokens that dense decoding has too.
    """

    number: int
    genome: Genome
    values: tuple[float, ...]


def open_storage(where: str, folder: Path) -> BaseStorage:
    """The storage that `where` names: a URL that Optuna knows, a journal file, or, with "", the
    journal `study.log` of the folder.
    """
    if "://" in where:
        try:
            return optuna.storages.get_storage(where)
        except Exception as error:  # of SQLAlchemy, of a driver that is missing, of a server
            raise AccelError(f"storage {where!r} cannot be opened: {error!s:.300}") from error
    path = Path(where) if where else folder / "study.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Workers on one machine, or on one file system with locks, pass here one by one; a lock ends
    with its process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Trials:
    """The study of one search.

    provenance: what values depend on; a study of another one is refused, whole: trials of two kinds
    are never mixed. first: genomes of the first generation, as many as a population has. third:
    the direction of a third objective, None where there is none.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        genes: Genes,
        provenance: Mapping[str, Any],
        first: Sequence[Genome],
        *,
        repair: Callable[[Genome], Genome],
        seed: int,
        lock: Path,
        third: StudyDirection | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = storage
        self._name = name
        self._genes = genes
        self._seed = seed
        self._repair = repair
        self._lock = lock
        self._me = {"machine": _machine(), "pid": os.getpid(), "began": _began(os.getpid())}
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> worker and beat, and since when
        self._space = {n: IntDistribution(0, s - 1) for n, s in genes.sizes.items()}
        self._strategy = _Offspring(genes, seed, repair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._sampler = NSGAIISampler(
                population_size=max(2, len(first)),
                seed=seed,
                child_generation_strategy=self._strategy,
            )
        directions = [*DIRECTIONS, *(() if third is None else (third,))]
        with one_at_a_time(lock):
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                sampler=self._sampler,
                directions=directions,
                load_if_exists=True,
            )
            self._check({**provenance, "objectives": [d.name.lower() for d in directions]})
            if "first_generation" not in self._study.user_attrs:
                for genome in first:
                    self._study.enqueue_trial(genes.to_params(genome), skip_if_exists=True)
                self._study.set_user_attr("first_generation", len(first))

    def _check(self, provenance: Mapping[str, Any]) -> None:
        known = self._study.user_attrs.get("provenance")
        if known is None and not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr("provenance", dict(provenance))
            known = provenance
        # a study that another program made says nothing, and is refused by what it does not say
        known = {**(known or {}), "objectives": [d.name.lower() for d in self._study.directions]}
        other = [
            f"{key} {known.get(key)!r:.120}, this search has {provenance.get(key)!r:.120}"
            for key in dict.fromkeys([*known, *provenance])
            if known.get(key) != provenance.get(key)
        ]
        if other:
            raise AccelError(
                f"the study {self._name!r} was made with {'; with '.join(other)}. Its trials are"
                " not comparable with new ones: take search.fresh=true (a study of its own for"
                " what this search has), another search.study=… or another out=…"
            )

    @property
    def finished(self) -> list[Done]:
        """Every finished trial, by number."""
        return [
            Done(t.number, self._genes.from_params(t.params), tuple(t.values))
            for t in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]

    def note(self, number: int, name: str, value: Any) -> None:
        """Keep something beside trial `number`, for those who look at the study."""
        found = self._study.get_trials(deepcopy=False)[number]
        self._storage.set_trial_user_attr(found._trial_id, name, value)

    def run(
        self,
        wanted: int,
        evaluate: Callable[[Genome], Sequence[float]],
        told: Callable[[Done], None] = lambda done: None,
    ) -> None:
        """Evaluate until the study has `wanted` finished trials, whoever finishes them."""
        while True:
            finished = self.finished
            if len(finished) >= wanted:
                return
            claimed = self._claim(wanted)
            if claimed is None:
                time.sleep(WAIT_S)  # others are at the last ones
                continue
            number, genome = claimed
            known = {done.genome: done for done in reversed(self.finished)}
            if genome in known:
                values: Sequence[float] = known[genome].values
                self.note(number, "same_as", known[genome].number)
            else:
                with self._beating(number):
                    values = evaluate(genome)
            self._study.tell(number, list(values), skip_if_finished=True)
            told(Done(number, genome, tuple(values)))

    @contextmanager
    def _beating(self, number: int) -> Iterator[None]:
        """While the context is open, the storage hears of trial `number` every BEAT_S."""
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(BEAT_S):
                count += 1
                # a storage that is away for a moment, or a trial that another has finished: if it
                # matters, it is the end of the evaluation that says so
                with suppress(Exception):
                    self._storage.set_trial_user_attr(trial_id, "beat", count)

        heart = threading.Thread(target=beat, name="accel heart", daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()

    def _claim(self, wanted: int) -> tuple[int, Genome] | None:
        """A trial to evaluate: one whose worker is gone, or a new one; None where all are taken."""
        with one_at_a_time(self._lock):
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state == TrialState.RUNNING and self._gone(trial):
                    return self._take(trial._trial_id)
            alive = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.RUNNING)]
            if len(alive) >= wanted:
                return None
            return self._take(self._study.ask()._trial_id)

    def _take(self, trial_id: int) -> tuple[int, Genome]:
        """Sign a trial, and give it its genome."""
        self._storage.set_trial_user_attr(trial_id, "worker", self._me)
        found = self._storage.get_trial(trial_id)
        self._strategy.number = found.number
        generation = self._sampler.get_trial_generation(self._study, found)
        missing = self._space.keys() - found.params.keys()
        if generation == 0 and missing and "fixed_params" not in found.system_attrs:
            # the first generation is still under way, and has no values to select by
            child = self._strategy.early(self._study)
            for name, value in ((n, v) for n, v in child.items() if n in missing):
                self._storage.set_trial_param(trial_id, name, value, self._space[name])
        trial = Trial(self._study, trial_id)
        params = {n: trial.suggest_int(n, 0, d.high) for n, d in self._space.items()}
        return trial.number, self._genes.from_params(params)

    def _gone(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial has ended."""
        worker = trial.user_attrs.get("worker")
        if worker is None:
            # who shares a journal shares a lock: claims are made one at a time, and this one was
            # not finished; of another storage, somebody may be at it
            return isinstance(self._storage, JournalStorage) or self._silent(trial, UNSIGNED_S)
        if worker == self._me:
            return True  # an evaluation of this process that an error or Ctrl-C ended
        if worker["machine"] == self._me["machine"]:
            return _began(worker["pid"]) != worker["began"]
        return self._silent(trial, STALE_S)

    def _silent(self, trial: FrozenTrial, seconds: float) -> bool:
        """Whether nothing was seen to change about a running trial for so long."""
        now, told = time.monotonic(), [trial.user_attrs.get(name) for name in ("worker", "beat")]
        before, since = self._seen.get(trial.number, (None, now))
        if before != told:
            self._seen[trial.number] = told, now
            return False
        return now - since > seconds


def _machine() -> str:
    """Where process numbers mean the same: the host's name, its start, and the number space, for
    containers may share a name.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _began(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None where there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            return stat.read_text().rsplit(")", 1)[1].split()[19]
        except (OSError, IndexError):
            return None
    try:
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return "running"


class _Offspring:
    """Optuna's `child_generation_strategy`: a child of two of the parents that NSGA-II selected.

    number: of the trial that is being made; with the seed it is all the randomness there is.
    """

    def __init__(self, genes: Genes, seed: int, repair: Callable[[Genome], Genome]) -> None:
        self._genes = genes
        self._seed = seed
        self._repair = repair
        self.number = 0

    def __call__(
        self, study: Study, search_space: dict[str, Any], parent_population: list[FrozenTrial]
    ) -> dict[str, int]:
        parents = sorted((self._genes.from_params(t.params), t.values) for t in parent_population)

        def pair(rng: Random) -> tuple[Genome, Genome]:
            one, time = _tournament(rng.choices(parents, k=2), study)
            near = sorted(parents, key=lambda p: abs(p[1][0] - time))[:MATES]
            return one, rng.choice(near)[0]

        return self._unknown(study, pair)

    def early(self, study: Study) -> dict[str, int]:
        """A child of a genome that somebody is at, while there are no parents yet."""
        known = sorted(self._known(study))

        def pair(rng: Random) -> tuple[Genome, Genome]:
            one = rng.choice(known)
            return one, one

        return self._unknown(study, pair)

    def _known(self, study: Study) -> set[Genome]:
        """What was evaluated, or is."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        trials = study.get_trials(deepcopy=False, states=states)
        names = self._genes.sizes.keys()
        return {self._genes.from_params(t.params) for t in trials if names <= t.params.keys()}

    def _unknown(
        self, study: Study, pair: Callable[[Random], tuple[Genome, Genome]]
    ) -> dict[str, int]:
        """A child that is not known; where it seems that there is none, a random one."""
        rng, known = Random(f"{self._seed} {self.number}"), self._known(study)
        for _ in range(ATTEMPTS):
            child = self._repair(self._genes.child(*pair(rng), rng))
            if child not in known:
                break
        else:
            child = self._repair(self._genes.random(rng))
        return self._genes.to_params(child)


def _tournament(
    pair: Sequence[tuple[Genome, Sequence[float]]], study: Study
) -> tuple[Genome, float]:
    """The better of two parents, the first where neither is better in everything; and its time."""
    (one, a), (other, b) = pair
    signs = [1 if d == MINIMIZE else -1 for d in study.directions]
    gains = [s * (x - y) for s, x, y in zip(signs, a, b, strict=True)]
    better = all(g >= 0 for g in gains) and any(g > 0 for g in gains)
    return (other, b[0]) if better else (one, a[0])
