"""What a pipeline generates, as all that is around it sees it: one class for each kind of output.

A comparison, a report and accel-generate ask an `Output` how a pipeline is called, how what it made
is kept and judged, and how that is told and shown. They have no branches of their own: what differs
between frames, texts and what is seen in images is in `frames_output`, `text_output` and
`vision_output`, and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accel.pipelines.measures import Column, Measure, Quality
from accel.pipelines.provenance import pipeline_files
from accel.recipes import Recipe

__all__ = ["Output", "Picture"]

Judged = Sequence[Mapping[str, Any] | None]


class Picture:
    """One picture of the trade-off: a quality over a speed, in a file of the report."""

    def __init__(self, file: str, speed: Measure, quality: Quality, about: str) -> None:
        self.file = file
        self.speed = speed
        self.quality = quality
        self.about = about


class Output(ABC):
    """A kind of output. A `config` is a `ModelConfig`, a `host` a `Host`, `call` the arguments of
    the pipeline; results, settings and arms are those of results.json.
    """

    name: ClassVar[str]
    # what one generation is, and the key of an arm's generations in results
    one: ClassVar[str]
    many: ClassVar[str]
    # modules of pipelines/ that compute generations, with what they import there, besides those of
    # every kind
    code: ClassVar[tuple[str, ...]] = ()
    # the arms that leave nothing out, beginning with the host as it is, and other names of that
    # one; they are recipes of their names where `setup` says nothing else
    baselines: ClassVar[tuple[str, ...]] = ("dense", "full", "half")
    names_of_dense: ClassVar[tuple[str, ...]] = ("dense",)
    # how many prompts are compared where nothing is said, None for all
    first: ClassVar[int | None] = 8
    # how often a generation is repeated for its time, of which the median counts
    repeats: ClassVar[int] = 1
    # whether models are small enough to see less: a smaller input is a rival, a compiled model too
    scales: ClassVar[bool] = False
    # whether diffusers' caches, predictions from kernel costs and attention maps are of use
    caches: ClassVar[bool] = True
    priced: ClassVar[bool] = True
    mapped: ClassVar[bool] = True
    quality: ClassVar[Quality]
    pictures: ClassVar[tuple[Picture, ...]]
    # what is told of every generation
    told: ClassVar[tuple[str, ...]]
    columns_of_speed: ClassVar[tuple[Column, ...]] = ()
    # how quality was measured, for the end of a report
    measured: ClassVar[str]

    # how a pipeline is configured and called

    @property
    def sources(self) -> tuple[Path, ...]:
        """The code that what is made of a prompt depends on, besides that of every kind."""
        own = Path(__file__).parent / f"{type(self).__module__.rpartition('.')[2]}.py"
        return (own, *pipeline_files(*self.code))

    @abstractmethod
    def check(self, config: Any) -> None:
        """Refuse a configuration that says nothing, or something wrong, of this output."""

    def asked(self, config: Any, name: str) -> tuple[str, ...]:
        """What stands for the `prompts` or the `calibration` that a configuration does not give."""
        return ()

    def stands_for(self, config: Any, prompt: str) -> str:
        """A prompt with all that it names: another one is another measurement."""
        return prompt

    def given(self, host: Any, prompt: str) -> Any:
        """What the pipeline is called with for a prompt."""
        return prompt

    def setup(self, name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """How the model is set up for the baseline `name` before anything else is done with it;
        None where the baseline is a recipe. With the key `compile`, of `options`, its first call
        compiles it.
        """
        return None

    def set_up(self, host: Any, setup: Mapping[str, Any]) -> None:
        """Change the loaded pipeline as `setup` has it."""
        raise NotImplementedError(f"models of {self.name} are not set up")

    def about(self, host: Any) -> dict[str, Any]:
        """What is told of an arm's model beside its plan."""
        return {}

    @abstractmethod
    def serves(self, recipe: Recipe) -> bool:
        """Whether a recipe is for models with this output."""

    @abstractmethod
    def steps(self, call: Mapping[str, Any]) -> int:
        """The steps of a dense generation."""

    @abstractmethod
    def shortened(self, call: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Arguments with which a generation has about `steps` steps, to warm up."""

    @abstractmethod
    def call(self, pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
        """The configured arguments for a pipeline as it is now: less what its plan decides."""

    @property
    @abstractmethod
    def output_type(self) -> str:
        """What a pipeline is asked for."""

    def callback(self, done: Any) -> dict[str, Any]:
        """Arguments with which a pipeline calls `done` after every step, where it has steps."""
        return {"callback_on_step_end": done}

    @abstractmethod
    def read(self, made: Any) -> Any:
        """The generation in what a pipeline returned."""

    @abstractmethod
    def dense_steps(self, schedule: Any, steps: int) -> list[bool]:
        """Which steps of a generation are dense; none where steps are not told apart."""

    @abstractmethod
    def place(self, session: Any, steps: int) -> dict[str, Any] | None:
        """Where a plan runs, to be compared with where it was made; None where that is no number of
        the model's.
        """

    # how a generation is kept and judged

    def counts(self, generation: Any) -> dict[str, Any]:
        """What is noted of a generation beside its time."""
        return {}

    @abstractmethod
    def save(self, path: Path, generation: Any, host: Any, prompt: str) -> None:
        """Keep a generation, and what only the model can say of it."""

    @abstractmethod
    def load(self, path: Path) -> Any:
        """What `save` kept."""

    @abstractmethod
    def judges(self, config: Any) -> str:
        """Names what judges generations besides the dense ones: another one judges anew."""

    @abstractmethod
    def judge(self, config: Any) -> Any:
        """What judges generations, loaded once; None where there is nothing."""

    @abstractmethod
    def judged(self, generation: Any, dense: Any, prompt: str, judge: Any) -> dict[str, Any]:
        """The quality of one generation. dense: the one it is held against, or None for itself."""

    @abstractmethod
    def results(
        self, found: Judged, dense: Judged, records: Mapping[int, Sequence[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """The fields of an arm's results that are this output's.

        found, dense: the qualities of the arm and of dense by prompt; records: what was measured of
        the arm, by prompt.
        """

    # how it is told and shown

    @abstractmethod
    def columns_of_quality(self, arms: Mapping[str, Any]) -> tuple[Column, ...]:
        """The columns of a table beside those of speed."""

    @abstractmethod
    def words(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """What one generation is, in words: how long, then how large."""

    @abstractmethod
    def prompts_in_words(self, prompts: Sequence[str]) -> str:
        """The prompts of a comparison, or what they are where they are long."""

    @abstractmethod
    def tiles(self, arm: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What stands in large print above a report: values, and what they are."""

    @abstractmethod
    def sections(self, folder: Path, results: Mapping[str, Any], shown: str) -> list[str]:
        """The sections of a report that show generations. shown: the arm that is in bold."""

    def files(self, results: Mapping[str, Any]) -> dict[str, str]:
        """What is written beside results.json: texts by names of files."""
        return {}

    # accel-generate

    @abstractmethod
    def checked_path(self, out: str | None) -> Path | None:
        """Where a generation is written, or an error; None where that is found later."""

    @abstractmethod
    def write(self, path: Path | None, generation: Any, *, fps: int | float, min_side: int) -> str:
        """Write a generation for people, and say what it is."""
