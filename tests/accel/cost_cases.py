"""A small table, a dense generation and plans whose prices can be checked by hand."""

from accel.baseline import Baseline
from accel.cost import KEEPS, CostTable, Price, Shape
from accel.geometry import Geometry, Site
from accel.kernels.arguments import RESTS
from accel.layout import Layout
from accel.plan import Plan
from accel.schedule import Schedule

LAYOUT = Layout.of((4, 8, 8))
BLOCK = (32, 32)
SHAPE = Shape(256, 2, 16, "float32", "cpu", BLOCK)
NAMES = tuple(f"{rest}/{order}" for rest in RESTS for order in ("natural", "ordered"))
EXTRA = dict(zip(NAMES, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), strict=True))
TABLE = CostTable.of(
    SHAPE,
    dense_ms=2.0,
    sparse={name: tuple(extra + keep for keep in KEEPS) for name, extra in EXTRA.items()},
    select={"block_mass": 2.0, "pooled": 0.5},
    dense={"full": 1.05, "half": 0.8},
    again={"block_mass": Price.known(1.25)},
)
GEOMETRY = Geometry("M", (Site("a", 2, 16), Site("b", 2, 16)))


def baseline(share=0.5, **more) -> Baseline:
    """Ten steps in 40 seconds, 5 of them outside, in two branches; b takes what a does thrice."""
    values = {"seconds": 40.0, "denoiser": 35.0, "branches": 2, "steps": 10, **more}
    return Baseline(share={"a": share / 4, "b": 3 * share / 4}, layout=LAYOUT, **values)


def plan(*choices, sites=("a", "b"), **schedule) -> Plan:
    """The choices for the two heads of the sites, the same in every band."""
    schedule = Schedule(**{"dense_start": 0.0, **schedule})
    heads = choices * 2 if len(choices) == 1 else choices
    bands = {s: (heads,) * schedule.n_bands for s in sites}
    return Plan.of("p", GEOMETRY, bands, schedule=schedule, block=BLOCK)
