"""Average the weights of trained models of one kind: a pipeline's folder from several.

    python samples/average_weights.py RUN RUN ... --out samples/models/llada-tiny

Of runs that began with the same weights the mean is often better than each (model soups, Wortsman
et al., 2022, arXiv 2203.05482): what is by chance in one run is not in another. The folder gets the
first one's other files.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["average", "main"]

WEIGHTS = "model.safetensors"


def average(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every weight, taken in float64, in the first one's precision."""
    for state in states[1:]:
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
            raise SystemExit("the models have other weights than the first, or of other shapes")
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(weight.dtype)
        for name, weight in states[0].items()
    }


def main(runs: Sequence[Path], out: Path) -> None:
    """Write the average of the runs' weights to `out`, which may be one of them."""
    found = [{p.relative_to(run): p for p in run.rglob(WEIGHTS)} for run in runs]
    if not found[0] or any(set(paths) != set(found[0]) for paths in found):
        raise SystemExit(f"the folders do not have the same files {WEIGHTS}")
    averaged = {name: average([load_file(paths[name]) for paths in found]) for name in found[0]}
    if out.resolve() not in [run.resolve() for run in runs]:
        shutil.copytree(runs[0], out, dirs_exist_ok=True)
    for name, state in averaged.items():
        part = (out / name).with_suffix(".part")
        save_file(state, part, metadata={"format": "pt"})
        part.replace(out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pipelines")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    main(options.runs, options.out)
