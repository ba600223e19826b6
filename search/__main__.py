"""`accel-search`: the hydra command of the search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from accel.command import hydra_version, run_command
from accel.errors import AccelError
from accel.hardware import CostSource
from accel.pipelines.calibration import calibrated_recipe
from accel.pipelines.host import Host, ModelConfig
from accel.pipelines.model_settings import model_config
from accel.plan import Plan, check_block
from accel.schedule import Schedule
from accel.search.finish import describe
from accel.search.image_search import ImageSearch
from accel.search.run import Search
from accel.search.settings import Budget, Evolution, SearchSettings
from accel.search.task_search import TaskSearch, TaskSettings
from accel.search.task_search import describe as describe_tasks
from accel.search.text_genes import TextGenes
from accel.search.text_search import TextSearch

# what a search by tasks does not read: it knows no dB, calibrates no heads and prices no choices
OF_FRAMES = (
    *("budget.psnr", "budget.time", "schedule", "dense_starts", "precisions", "rows"),
    *("tolerance", "recipes", "hardware"),
    *(
        f"search.{name}"
        for name in ("levels", "fidelity", "steps", "time_limit", "floor", "memory")
    ),
)


def settings_of(config: Mapping[str, Any]) -> SearchSettings:
    """The settings that a configuration describes."""
    return SearchSettings(
        space=config["space"],
        schedule=Schedule.from_dict(config["schedule"]),
        budget=Budget(**config["budget"]),
        evolution=Evolution(**config["search"]),
        block=check_block(config["block"]),
        dense_starts=config["dense_starts"],
        precisions=config["precisions"],
        rows=config["rows"],
        tolerance=config["tolerance"],
        cost_rounds=config["cost_rounds"],
        points=config["points"],
        recipes=config["recipes"],
        seed=config["seed"],
        hardware=CostSource.of(config["hardware"]),
    )


def search(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Run the search that `config` describes and say where the plan is.

    overrides: what was asked for on the command line; what would not be read is an error.
    """
    folder = Path(config["out"])
    model = model_config(config["model"])
    if config["recipe"]:
        host = Host(model)
        plan = calibrated_recipe(
            host,
            config["recipe"],
            folder,
            seed=config["seed"],
            rows=config["rows"],
            **config["parameters"],
        )
        print(f"plan: {_save(plan, config, folder / f'{plan.name}.json')}")
        return
    if model.output != "frames":
        refuse_unread(model, overrides)
        _search_tasks(config, model, folder)
        return
    settings = settings_of(config)
    outcome = Search(model, settings, folder).run()
    for line in describe(outcome, settings):
        print(line)
    print(f"plan: {_save(outcome.plan, config, folder / 'plan.json')}")
    print(f"front: {folder / 'front.json'}\ntrade-off: {folder / 'front.png'}")
    print(f"what every head does: {folder / 'heads.png'}")


def refuse_unread(model: ModelConfig, overrides: Sequence[str]) -> None:
    """Refuse settings that a search by tasks does not read."""
    for override in overrides:
        name = override.lstrip("+~").partition("=")[0]
        unread = OF_FRAMES if model.output == "vision" else (*OF_FRAMES, "cost_rounds")
        if any(name == one or name.startswith(f"{one}.") for one in unread):
            raise AccelError(
                f"{name} does nothing in a search of a {model.output} model; leave it out"
                " (budget.accuracy is its budget)"
            )


def by_tasks(config: Mapping[str, Any], model: ModelConfig, folder: Path) -> TaskSearch:
    """The search of a model that is judged by what it is for: a text model, or one of images."""
    space = config["space"]
    asked: dict[str, Any] = {
        "evolution": Evolution(**config["search"]),
        "loss": Budget(**config["budget"]).accuracy,
        "points": config["points"],
        "seed": config["seed"],
    }
    if model.output == "vision":
        return ImageSearch.of(model, space, folder, config["cost_rounds"], **asked)
    if space.get("name") != "text":
        raise AccelError(
            f"space {space.get('name')!r} is none of a text model, which needs space=text"
        )
    genes = TextGenes.of(space["genes"], check_block(config["block"]))
    first = space.get("first", ())
    return TextSearch(model, TaskSettings(genes=genes, first=first, **asked), folder)


def _search_tasks(config: Mapping[str, Any], model: ModelConfig, folder: Path) -> None:
    search = by_tasks(config, model, folder)
    outcome = search.run()
    for line in (*describe_tasks(outcome, search.settings), *search.more(outcome)):
        print(line)
    print(f"plan: {_save(outcome.chosen.plan, config, folder / 'plan.json')}")
    print(f"front: {folder / 'front.json'}\ntrade-off: {folder / 'front.png'}")


def _save(plan: Plan, config: Mapping[str, Any], default: Path) -> Path:
    return plan.save(config["plan"] or default)


@hydra.main(version_base=hydra_version(), config_path="pkg://accel.configs", config_name="search")
def main(config: DictConfig) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    run_command(lambda: search(settings, overrides), resumes=True)


if __name__ == "__main__":
    main()
