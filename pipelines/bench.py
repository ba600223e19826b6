"""`accel-bench`: what attention kernels cost on this device, each checked before it is timed."""

import shlex
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tqdm import tqdm

from accel.command import run_command
from accel.errors import AccelError
from accel.pipelines.bench_kernels import Bench, fastest
from accel.pipelines.bench_page import write_page
from accel.pipelines.bench_plot import write_plots
from accel.pipelines.bench_results import Results, Row
from accel.pipelines.bench_settings import BenchSettings, Case, bench_settings
from accel.pipelines.bench_table import as_text


def bench(config: dict[str, Any], command: str) -> None:
    """Measure what `config` asks for and is not there yet; print it, and write it with plots.

    command: what was typed, for the page.
    """
    if config["kernel"] == "wan_step":
        from accel.pipelines.bench_wan_step import wan_step

        return wan_step(config)
    settings = bench_settings(config)
    if config["tune"]:
        from accel.pipelines.bench_tune import tune

        tune(settings)
    folder = Path(config["out"])
    results = Results(folder / "bench.json", settings.device, settings.conditions)
    rows = run(settings, results)
    print(as_text(rows))
    for path in write_plots(rows, folder):
        print(f"plot: {path}")
    print(f"results: {results.path}")
    if config["page"]:
        path = write_page(results.about(rows), rows, Path(config["page"]), command)
        print(f"page: {path}")
    if not any(row.ms for row in rows):
        raise AccelError("nothing could be timed; the reasons stand in the table")


def run(settings: BenchSettings, results: Results) -> list[Row]:
    """The rows of every kernel and case; those that `results` holds are not measured again.

    A case that finds no memory is said and left out, and so are kernels without a baseline.
    """
    rows: list[Row] = []
    parts = sum(_parts(kernel, settings) for kernel in ("dense", *settings.kernels))
    with torch.no_grad(), tqdm(total=len(settings.cases) * parts, unit="mask") as bar:
        for case in settings.cases:
            try:
                rows += _measure(case, settings, results, bar)
            except torch.OutOfMemoryError as error:
                bar.write(f"{case.shape} {case.dtype} is left out: {str(error).splitlines()[0]}")
    return rows


def _measure(case: Case, settings: BenchSettings, results: Results, bar: tqdm) -> list[Row]:
    """Rows of one case, kept kernel by kernel."""
    made: Bench | None = None
    rows: list[Row] = []
    for kernel in ("dense", *settings.kernels):
        found = results.of(kernel, case)
        if found:
            bar.update(_parts(kernel, settings))
            rows += found
            continue
        baseline = fastest(results.of("dense", case))
        if kernel != "dense" and baseline is None:
            break
        made = made or Bench(case, settings)
        bar.set_description(f"{case.shape} {case.dtype} {kernel}")
        for some in made.rows(kernel, baseline or ""):
            found += some
            bar.update()
        results.add(found)
        rows += found
    return rows


def _parts(kernel: str, settings: BenchSettings) -> int:
    """How many times a kernel gives rows for one case."""
    parts = {"dense": 1, "attention": len(settings.blocks) * len(settings.masks)}
    return parts.get(kernel, len(settings.blocks))


@hydra.main(version_base="1.3", config_path="pkg://accel.configs", config_name="bench")
def main(config: Any) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    typed = shlex.join(["accel-bench", *HydraConfig.get().overrides.task])
    run_command(lambda: bench(settings, typed), resumes=True)


if __name__ == "__main__":
    main()
