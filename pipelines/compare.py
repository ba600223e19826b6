"""`accel-compare`: dense, plans, published recipes and caches side by side: speed and quality."""

import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from accel.command import run_command
from accel.errors import AccelError
from accel.files import write_atomically
from accel.pipelines.compare_arms import named_caches, named_fronts, named_plans
from accel.pipelines.compare_run import Comparison
from accel.pipelines.compare_settings import CompareSettings
from accel.pipelines.compare_table import as_markdown, as_text
from accel.pipelines.model_settings import model_config


def compare(config: dict[str, Any], command: str) -> None:
    """Run the comparison that `config` describes, print its table and say where the report is.

    command: what was typed, for the report.
    """
    model = model_config(config["model"])
    settings = CompareSettings(
        plans=named_plans(config["plan"]),
        fronts=named_fronts(config["front"]),
        recipes=config["recipes"],
        caches=named_caches(config["caches"]),
        combined=config["combined"],
        prompts=config["prompts"],
        dtypes=config["dtype"] or config["dtypes"],
        rounds=config["rounds"],
        timing_prompts=config["timing_prompts"],
        seed=config["seed"],
        predict=config["predict"],
        baselines=config["baselines"] or model.kind.baselines,
        arms_timeout_s=config["arms_timeout_s"],
        loaded_at_once=config["loaded_at_once"],
        command=command,
        output=model.output,
        scaled=config["scaled"] or (),
        compiled=config["compiled"] or False,
        compile=config["compile"] or {},
    )
    folder = Path(config["out"])
    results = Comparison(model, settings, folder).run()
    print(as_text(results))
    table = write_atomically(folder / "results.md", as_markdown(results))
    print(f"results: {folder / 'results.json'}\ntable: {table}")
    for name, content in model.kind.files(results).items():
        print(f"{Path(name).suffix[1:]}: {write_atomically(folder / name, content)}")
    if config["report"]:
        from accel.pipelines.report import write_report

        print(f"report: {write_report(folder)}")
    if not any(arm["seconds"] for arm in results["arms"].values()):
        raise AccelError("no arm finished; what went wrong stands below the table")


@hydra.main(version_base="1.3", config_path="pkg://accel.configs", config_name="compare")
def main(config: Any) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    typed = shlex.join(["accel-compare", *HydraConfig.get().overrides.task])
    run_command(lambda: compare(settings, typed), resumes=True)


if __name__ == "__main__":
    main()
