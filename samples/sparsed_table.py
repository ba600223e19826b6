"""SparseD's table of contexts and steps, predicted for a GPU from its data sheet.

    python samples/sparsed_table.py --hardware a100-80g

The paper (arXiv 2509.24014) times LLaDA-1.5 on an A800 with 80 GB, 128 generated tokens: dense
attention against its masks. Here the shapes of that model are priced by the roofline of
`accel.roofline`, with accel's kernels and its exact masses from two streamed passes. These are
predictions, not measurements. Where a GPU is at hand `accel-bench shapes=llada-8b` measures the
kernels themselves.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from accel.baseline import Baseline
from accel.choice import Choice
from accel.cost import price
from accel.cost_table import Shape
from accel.estimators import BlockMassTopK
from accel.geometry import Geometry, Site
from accel.hardware import CostSource, Hardware
from accel.layout import Layout
from accel.plan import Plan
from accel.recipes import recipe
from accel.roofline import roofline_baseline, roofline_table

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "hardware"
HEADS, DIM, LAYERS, PARAMETERS = 32, 128, 32, 8_000_000_000
GEOMETRY = Geometry("LLaDA-8B", tuple(Site(f"blocks.{i}", HEADS, DIM) for i in range(LAYERS)))
GENERATED, BLOCK = 128, (128, 64)
CONTEXTS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536}
STEPS = (128, 256, 512, 1024)
# seconds of dense and of SparseD in the paper, 128 steps
PUBLISHED = {
    "4k": (38, 41),
    "8k": (94, 95),
    "16k": (245, 230),
    "32k": (690, 596),
    "64k": (2127, 1695),
}


def plans() -> dict[str, Plan]:
    """SparseD's own settings, and the same with one query row of four looked at and less kept."""
    own = recipe("sparsed", GEOMETRY, block=BLOCK)
    sampled = Choice(BlockMassTopK(keep=0.15, by_grid=True, every=4))
    sites = {site.name: ((sampled,) * HEADS,) for site in GEOMETRY.sites}
    return {"keep 0.3, exact": own, "keep 0.15, every 4th row": replace(own, sites=sites)}


def predicted(plan: Plan, hardware: Hardware, tokens: int, steps: int) -> tuple[float, float]:
    """Seconds of a generation, dense and with the plan."""
    layout = Layout.of([(1, 1, tokens - GENERATED), (1, 1, GENERATED)])
    nothing = Baseline(1.0, {}, layout, branches=1, steps=steps)
    baseline = roofline_baseline(nothing, GEOMETRY, PARAMETERS, "bfloat16", hardware)
    shape = Shape(tokens, HEADS, DIM, "bfloat16", "cuda", BLOCK)
    estimator = next(iter(plan.sites.values()))[0][0].select
    tables = {"full": roofline_table(shape, hardware, (estimator,))}
    found = price(replace(plan, grid=None), tables, baseline, steps=steps).expected
    return found["dense_seconds"], found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "auto")
    parser.add_argument("--hardware", default="a100-80g", choices=known)
    name = parser.parse_args().hardware
    hardware = CostSource.of(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())).hardware
    print(f"Predicted from the data sheet ({hardware.name}), not measured: seconds of dense and of")
    print("the plan, and their ratio; LLaDA-8B, bfloat16, 128 generated tokens, every call whole.")
    for told, plan in plans().items():
        print(f"\n| {told} | {' | '.join(CONTEXTS)} |")
        print("|---|" + "---|" * len(CONTEXTS))
        for steps in STEPS:
            cells = []
            for tokens in CONTEXTS.values():
                dense, sparse = predicted(plan, hardware, tokens, steps)
                cells.append(f"{dense:.0f} → {sparse:.0f} ({dense / sparse:.2f}x)")
            print(f"| {steps} steps | {' | '.join(cells)} |")
    print(f"\n| published, A800 | {' | '.join(CONTEXTS)} |")
    print("|---|" + "---|" * len(CONTEXTS))
    cells = [f"{a} → {b} ({a / b:.2f}x)" for a, b in PUBLISHED.values()]
    print(f"| 128 steps | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
