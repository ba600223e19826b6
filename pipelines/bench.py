"""`accel-bench`: what attention costs on this device, dense and at falling keeps."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from accel.command import run_command
from accel.cost import KEEPS, CostTable, Shape, measure
from accel.errors import AccelError, nearest
from accel.files import write_atomically
from accel.pipelines.host import DTYPES, resolve_device
from accel.plan import check_block
from accel.untrusted import check_whole


def table_of(costs: CostTable) -> str:
    """The prices as text: milliseconds, and how many times as fast as dense."""
    shape = costs.shape
    lines = [
        f"{shape.tokens} tokens, {shape.heads} x {shape.head_dim}, {shape.dtype},"
        f" block {shape.block[0]} x {shape.block[1]}, {shape.device}:"
        f" dense {costs.dense_ms:.1f} ms",
        f"{'keep':>18}" + "".join(f"{keep:>9.2f}" for keep in KEEPS),
    ]
    for name, prices in costs.sparse.items():
        lines.append(f"{name:>15} ms" + "".join(f"{p * costs.dense_ms:9.1f}" for p in prices))
        lines.append(f"{'x':>18}" + "".join(f"{1 / p:9.2f}" for p in prices))
    return "\n".join(lines)


def bench(config: dict[str, Any]) -> None:
    """Measure every shape and block of the configuration; print, and write JSON."""
    device = resolve_device("device", config["device"]).type
    if config["dtype"] not in DTYPES:
        raise AccelError(
            f"dtype {config['dtype']!r} is unknown; {nearest(config['dtype'], DTYPES)}"
        )
    check_whole("rounds", config["rounds"], 1)
    for size in config["shapes"]:
        for name in ("tokens", "heads", "head_dim"):
            check_whole(f"shapes.{name}", size.get(name), 1)
    results = []
    for size in config["shapes"]:
        for block in config["blocks"]:
            block = check_block(block)
            shape = Shape(**size, dtype=config["dtype"], device=device, block=block)
            costs = measure(
                shape,
                rounds=config["rounds"],
                progress=lambda jobs: tqdm(list(jobs), desc="measuring", unit="price", leave=False),
            )
            results.append(asdict(costs))
            print(table_of(costs), end="\n\n")
    path = Path(config["out"]) / "bench.json"
    write_atomically(path, json.dumps({"torch": torch.__version__, "tables": results}, indent=1))
    print(f"written: {path}")


@hydra.main(version_base="1.3", config_path="pkg://accel.configs", config_name="bench")
def main(config: DictConfig) -> None:
    """Entry point of the console script."""
    run_command(lambda: bench(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
