"""`accel-bench`: what attention kernels cost on this device, each checked before it is timed."""

import shlex
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tqdm import tqdm

from accel.command import hydra_version, run_command
from accel.errors import AccelError
from accel.pipelines.bench.case import BenchSettings, Case, Part
from accel.pipelines.bench.kernels import KERNELS, Bench, fastest
from accel.pipelines.bench.page import write_page
from accel.pipelines.bench.plot import write_plots
from accel.pipelines.bench.results import Results, Row
from accel.pipelines.bench.settings import bench_settings, page_path
from accel.pipelines.bench.table import as_text


def bench(config: dict[str, Any], command: str) -> None:
    """Measure what `config` asks for and is not there yet; print it, and write it with plots.

    command: what was typed, for the page.
    """
    folder, page = Path(config["out"]), page_path(config["page"])
    if config["kernel"] == "wan_step":
        from accel.pipelines.bench.wan_step import wan_step

        results = wan_step(config)
        rows = results.rows
    else:
        settings = bench_settings(config)
        if config["tune"]:
            from accel.pipelines.bench.tune import tune

            tune(settings)
        results = Results(folder / "bench.json", settings.device, settings.conditions)
        rows = run(settings, results)
    print(as_text(rows))
    for path in write_plots(rows, folder):
        print(f"plot: {path}")
    print(f"results: {results.path}")
    if not any(row.ms for row in rows):
        raise AccelError("nothing could be timed; the reasons stand in the table")
    if page is not None:
        print(f"page: {write_page(results.about(rows), rows, page, command)}")


def run(settings: BenchSettings, results: Results) -> list[Row]:
    """The rows of every kernel and case; those that `results` holds are not measured again, unless
    they failed of what may have passed.

    A case that finds no memory is said and left out, and so are kernels without a baseline.
    """
    jobs = [
        (kernel, part)
        for kernel in ("dense", *settings.kernels)
        for part in KERNELS[kernel].parts(settings)
    ]
    with torch.no_grad(), tqdm(total=len(settings.cases) * len(jobs), unit="mask") as bar:
        for case in settings.cases:
            try:
                _measure(case, jobs, settings, results, bar)
            except torch.OutOfMemoryError as error:
                bar.write(f"{case.shape} {case.dtype} is left out: {str(error).splitlines()[0]}")
    known = {case: results.of(case) for case in settings.cases}
    return [
        row
        for case, rows in known.items()
        for kernel, part in jobs
        for row in rows
        if row.of(kernel, case, part)
    ]


def _measure(
    case: Case, jobs: list[tuple[str, Part]], settings: BenchSettings, results: Results, bar: tqdm
) -> None:
    """Add the rows of one case, kept part by part."""
    made: Bench | None = None
    for kernel, part in jobs:
        bar.update()
        found = [row for row in results.of(case) if row.of(kernel, case, part)]
        if found and not any(row.failed for row in found):
            continue
        known = [row for row in results.of(case) if not row.failed]
        if kernel != "dense" and fastest(known) is None:
            continue
        made = made or Bench(case, settings)
        bar.set_description(f"{case.shape} {case.dtype} {kernel}")
        results.add(made.rows(kernel, part, known))


@hydra.main(version_base=hydra_version(), config_path="pkg://accel.configs", config_name="bench")
def main(config: Any) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    typed = shlex.join(["accel-bench", *HydraConfig.get().overrides.task])
    run_command(lambda: bench(settings, typed), resumes=True)
