"""`accel-generate`: one video, image or text from one prompt, with a plan, a cache, or neither."""

import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from accel.command import run_command
from accel.errors import AccelError
from accel.pipelines.adapters import denoisers_of
from accel.pipelines.announce import promise
from accel.pipelines.cache_hooks import enable_cache, magnitude_ratios
from accel.pipelines.caches import CacheSpec
from accel.pipelines.enable import enable, session_of, summary
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.paths import find_path


def generate(config: dict[str, Any]) -> None:
    """Generate what `config` describes, write the file, and say what the plan did."""
    prompt = _prompt(config["prompt"], config.get("prompt_file"))
    model = model_config(config["model"])
    kind = model.kind
    cache = None if config["cache"] is None else CacheSpec.of(config["cache"])
    if cache is not None and not kind.caches:
        raise AccelError(
            f"cache={cache.kind} is one of diffusers', which know nothing of {kind.name};"
            " take a plan that keeps keys and values, as in plan=sparse_dllm"
        )
    path = kind.checked_path(config["out"])
    host = Host(model)
    if config["plan"]:
        enable(host.pipe, find_path(config["plan"]), strict=config["strict"])
        print(_promised(host))
    overrides = {} if config["steps"] is None else {"num_inference_steps": config["steps"]}
    if cache is not None:
        ratios = None
        if cache.kind == "magcache":  # which a whole generation has to come before
            ratios = magnitude_ratios(host, model.calibrated_on[0], 0)
        enable_cache(host.pipe, cache, steps=config["steps"] or host.steps, ratios=ratios)
    begun = time.perf_counter()
    host.pipe.set_progress_bar_config(disable=False)
    made = host.generate(prompt, config["seed"], **overrides)
    seconds = time.perf_counter() - begun
    written = kind.write(path, made, fps=model.fps, min_side=config["min_side"])
    if config["plan"]:
        print(summary(host.pipe))
    print(f"{written}, generated in {seconds:.1f} s")


def _prompt(given: Any, file: str | None) -> str:
    """What is asked for; of a file, which is taken as it is, line breaks at its end too."""
    prompt = "" if given is None else str(given).strip()
    if file is not None:
        path = Path(find_path(file))
        if not path.is_file():
            raise AccelError(f"prompt_file: there is no file {file!r}")
        if prompt:
            raise AccelError("prompt and prompt_file are two prompts; give one")
        prompt = path.read_text(encoding="utf-8")
    if not prompt.strip():
        raise AccelError("there is no prompt; give one: prompt='a seven moving left'")
    return prompt


def _promised(host: Host) -> str:
    """What the plans in use promise, in one line."""
    plans = [session_of(model).plan for model in denoisers_of(host.pipe)]
    told = [
        promise(plan)
        or f"plan {plan.name!r}: no speed-up is predicted, for it was not priced; accel-search"
        " makes plans that are"
        for plan in plans
    ]
    return "; ".join(dict.fromkeys(told))


@hydra.main(version_base="1.3", config_path="pkg://accel.configs", config_name="generate")
def main(config: Any) -> None:
    """Entry point of the console script."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    run_command(lambda: generate(settings))


if __name__ == "__main__":
    main()
