"""`accel-search`: the hydra command of the search."""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from accel.command import run_command
from accel.pipelines.model_settings import model_config
from accel.plan import check_block
from accel.schedule import Schedule
from accel.search.run import Search, SearchSettings, describe


def search(config: dict[str, Any]) -> None:
    """Run the search that `config` describes and say where the plan is."""
    settings = SearchSettings(
        space=config["space"],
        budget=config["budget"]["time"],
        schedule=Schedule.from_dict(config["schedule"]),
        block=check_block(config["block"]),
        precision=config["precision"],
        rows=config["rows"],
        tolerance=config["tolerance"],
        cost_rounds=config["cost_rounds"],
        validate=config["validate"],
        seed=config["seed"],
    )
    folder = Path(config["out"])
    plan, points = Search(model_config(config["model"]), settings, folder).run()
    path = plan.save(config["plan"] or folder / "plan.json")
    for line in describe(plan, points, settings.budget):
        print(line)
    print(f"plan: {path}\ntrade-off: {folder / 'front.png'}")


@hydra.main(version_base="1.3", config_path="pkg://accel.configs", config_name="search")
def main(config: DictConfig) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    run_command(lambda: search(settings), resumes=True)


if __name__ == "__main__":
    main()
