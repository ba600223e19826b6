"""Published methods, each as a function from a model's geometry to a plan.

Shares and dense steps default to the papers'; where a paper counts steps, the schedule here holds
the same fraction of the run. The block does not: it is (128, 64), the tile of the kernel, unless a
recipe says otherwise (AdaSpa's paper has 64 tokens). What else departs is said at the recipe.
"""

from collections.abc import Callable
from typing import Any

from accel.choice import DENSE, Choice
from accel.errors import PlanError, nearest
from accel.estimators import AdaptiveBlockMass, BlockMassTopK, Pooled
from accel.geometry import Geometry
from accel.pattern import FirstFrames, Radial, Union, Window
from accel.plan import Plan
from accel.schedule import Schedule

Recipe = Callable[..., Plan]
RECIPES: dict[str, Recipe] = {}


def _published(function: Recipe) -> Recipe:
    if function.__name__ in RECIPES:
        raise ValueError(f"there is a recipe {function.__name__!r} already")
    RECIPES[function.__name__] = function
    return function


def recipe(name: str, geometry: Geometry, **parameters: Any) -> Plan:
    """The plan of recipe `name` for a model; parameters override the method's defaults."""
    if name not in RECIPES:
        raise PlanError(f"there is no recipe {name!r}; {nearest(name, RECIPES)}")
    try:
        plan = RECIPES[name](geometry, **parameters)
    except PlanError:
        raise
    except (TypeError, ValueError) as error:
        raise PlanError(f"recipe {name!r}: {error}") from error
    return plan


@_published
def full(geometry: Geometry, *, block: tuple[int, int] = (128, 64)) -> Plan:
    """Dense attention by accel's own kernel: nothing is left out, so results agree up to rounding.

    Tiled exact attention with an online softmax (FlashAttention, arXiv 2205.14135). Where it beats
    the host's attention it is the dense baseline that speed is measured against.
    """
    return _own_dense("full", geometry, block)


@_published
def half(geometry: Geometry, *, block: tuple[int, int] = (128, 64)) -> Plan:
    """`full` with 16-bit operands: the dense baseline of plans whose precision is `half` or less.

    Other than `full` where the model computes in fp32.
    """
    return _own_dense("half", geometry, block)


def _own_dense(precision: str, geometry: Geometry, block: tuple[int, int]) -> Plan:
    return Plan.uniform(
        precision,
        geometry,
        DENSE,
        dense="kernel",
        precision=precision,
        schedule=Schedule(dense_start=1.0),
        block=block,
        provenance={"recipe": precision},
    )


def _behind(dense_sites: int, geometry: Geometry, choice: Choice) -> dict[str, Any]:
    """The choice for every head of all sites but the first so many, in one band."""
    if not 0 <= dense_sites < len(geometry.sites):
        raise PlanError(
            f"dense_sites is {dense_sites}; the model has {len(geometry.sites)} sites, and one at"
            " least has to be sparse"
        )
    return {s.name: ((choice,) * s.heads,) for s in geometry.sites[dense_sites:]}


@_published
def sparsed(
    geometry: Geometry,
    *,
    keep: float = 0.3,
    dense_start: float = 0.2,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """SparseD: after a dense start, per-head blocks by exact mass, found once and reused.

    Per query block the `keep` heaviest blocks by the two-pass log-sum-exp method, text columns
    apart from visual ones (arXiv 2509.24014: dense for 20% of the steps, select 30%).
    """
    return Plan.uniform(
        "sparsed",
        geometry,
        Choice(BlockMassTopK(keep=keep)),
        schedule=Schedule(dense_start=dense_start),
        block=block,
        provenance={"recipe": "sparsed", "keep": keep},
    )


@_published
def adaspa(
    geometry: Geometry,
    *,
    keep: float = 0.2,
    dense_start: float = 0.2,
    refresh: tuple[float, ...] = (0.6,),
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """AdaSpa: exact block mass, head-adaptive keep, one refresh with the cached log-sum-exp.

    10 of 50 steps dense, searches at steps 10 and 30, sparsity 0.8 (arXiv 2502.21079, ICCV 2025).
    Its blocks are of 64 tokens in the paper: `block=(64, 64)`.
    """
    return Plan.uniform(
        "adaspa",
        geometry,
        Choice(AdaptiveBlockMass(keep=keep)),
        schedule=Schedule(dense_start=dense_start, refresh=refresh),
        block=block,
        provenance={"recipe": "adaspa", "keep": keep},
    )


@_published
def radial(
    geometry: Geometry,
    *,
    decay: float = 0.2,
    dense_start: float = 0.24,
    dense_sites: int = 1,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """Radial Attention: a band whose width halves with the logarithm of the frame distance.

    One static mask for all heads, with the first frame as sink; 12 of 50 steps and the first layer
    dense, decay 0.2 as for Wan 2.1 (arXiv 2506.19852, NeurIPS 2025).
    """
    choice = Choice(Radial(decay=decay, first_frame_sink=True))
    schedule = Schedule(dense_start=dense_start)
    sites = _behind(dense_sites, geometry, choice)
    return Plan.of(
        "radial",
        geometry,
        sites,
        schedule=schedule,
        block=block,
        provenance={"recipe": "radial", "decay": decay},
    )


@_published
def window(
    geometry: Geometry,
    *,
    t: int | float | None = None,
    h: int | float | None = 0.2,
    w: int | float | None = 0.2,
    sink_frames: int = 0,
    order: str = "hwt",
    rest: str = "drop",
    dense_start: float = 0.2,
    block: tuple[int, int] = (128, 64),
) -> Plan:
    """A window of half-widths (t, h, w) around every token.

    Half-widths in frames, rows and columns, or as fractions of the axis; None is unlimited. The
    default sees the spatial neighbourhood in all frames, the diagonal of SVG's temporal heads
    (arXiv 2502.01776), in the order that makes it a band. `sink_frames` keeps so many first frames
    for all rows as well: for windows in time, in an order of whole frames or of tiles. In `hwt` a
    block has tokens of every frame, so a sink there would keep all blocks.
    """
    near = Window(t=t, h=h, w=w)
    select = Union((near, FirstFrames(sink_frames))) if sink_frames else near
    return Plan.uniform(
        "window",
        geometry,
        Choice(select, order=order, rest=rest),
        schedule=Schedule(dense_start=dense_start),
        block=block,
        provenance={"recipe": "window"},
    )


@_published
def pisa(
    geometry: Geometry,
    *,
    keep: float = 0.15,
    order: str = "tile(4,4,4)",
    rest: str = "taylor",
    dense_start: float = 0.2,
    dense_sites: int = 1,
    block: tuple[int, int] = (64, 64),
) -> Plan:
    """Piecewise sparse attention: pooled selection, the rest by its block means to first order.

    Per query block the top `keep` of q_mean . k_mean + ln ||G||; every other block stands as one
    key with the weight of its length, and its values turn with the query by a mean slope. 10 of 50
    steps and the first layer dense; blocks are compact tiles of space-time (arXiv 2602.01077). The
    slope is one for 32 blocks, as in PASA (arXiv 2604.12219), not one for the head, and `rest=mean`
    is the zeroth order. Selection is made anew in every step in the paper; here once per refresh
    point, four of them.
    """
    choice = Choice(Pooled(keep=keep), order=order, rest=rest)
    sites = _behind(dense_sites, geometry, choice)
    return Plan.of(
        "pisa",
        geometry,
        sites,
        schedule=Schedule(dense_start=dense_start, refresh=(0.4, 0.6, 0.8)),
        block=block,
        provenance={"recipe": "pisa", "keep": keep},
    )
