"""Parts of a small training run: a resumable clock-driven loop, Muon, and a moving average of
weights.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "Average",
    "Length",
    "Muon",
    "Run",
    "average_gradients",
    "parameters_of",
    "rank_and_world",
    "save_atomically",
    "save_pipeline",
    "stages_table",
]


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _of_rank_zero(value: float) -> float:
    """Rank 0's value, so that all ranks agree on the clock."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the ranks, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def save_atomically(value: object, path: Path) -> None:
    """`torch.save` that a kill at any moment leaves either the old or the new file of, never half
    of one.
    """
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)


def save_pipeline(pipe: DiffusionPipeline, out: Path) -> None:
    """Write the pipeline beside `out`, then put its parts in place, so that a reader never meets
    half a file.
    """
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.save_pretrained(part, safe_serialization=True)
    for source in sorted(part.rglob("*")):
        target = out / source.relative_to(part)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    shutil.rmtree(part)


def _orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on `[n, rows, columns]`: the nearest (semi-)orthogonal matrices, in
    float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W -= lr * (0.2 * sqrt(max(W.shape)) * orthogonal(m) + decay * W).

    Convolution weights count as matrices `[out, in * kernel]`.

    `torch.optim.Muon` iterates in bfloat16, which many CPUs emulate; this one stays in float32 and
    batches the iteration over all matrices of one shape. Update sizes match AdamW, so both share a
    learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for shape, weights in by_shape.items():
                directions = []
                for weight in weights:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 1 - group["momentum"])
                    directions.append(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
                updates = _orthogonalise(torch.stack(directions)) * (0.2 * max(shape) ** 0.5)
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["decay"]).sub_(
                        update.view_as(weight), alpha=group["lr"]
                    )


class Average:
    """Exponential moving average of the parameters of `modules`, whose horizon grows with the step
    count.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay = modules, decay
        self.weights = {
            key: {k: v.clone() for k, v in m.state_dict().items()} for key, m in modules.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, module in self.modules.items():
            for name, value in module.state_dict().items():
                self.weights[key][name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict:
        return self.weights

    def load_state_dict(self, state: dict) -> None:
        self.weights = state


@dataclass(frozen=True, slots=True)
class Length:
    """How long a stage trains: `minutes` on the clock, or `steps` where that is given.

    Rates and phases follow the progress, so only a length in steps gives the same weights twice.
    """

    minutes: float
    steps: int | None = None

    def progress(self, done: dict[str, float]) -> float:
        """From 0 to 1; a length of nothing is over at once."""
        whole, part = (60 * self.minutes, done["seconds"])
        if self.steps is not None:
            whole, part = self.steps, done["steps"]
        return min(1.0, part / whole) if whole > 0 else 1.0


@dataclass(frozen=True)
class Run:
    """A work folder with one checkpoint per stage and a log of JSON lines."""

    folder: Path
    seed: int

    def log(self, **record: object) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def stage(
        self,
        name: str,
        length: Length,
        parts: dict[str, object],
        step: Callable[[int, float], dict[str, float]],
        *,
        checkpoint_minutes: float = 3.0,
        after_checkpoint: Callable[[float], None] = lambda progress: None,
    ) -> dict:
        """Call `step(index, progress)` until `length` has been trained in all, over any number of
        restarts.

        `parts` are the things with a `state_dict`. What a step does must depend on its index and
        the progress alone. Returns `{"steps": …, "seconds": …}`.
        """
        path = self.folder / f"{name}.pt"
        done = {"steps": 0, "seconds": 0.0}
        if path.exists():
            saved = torch.load(path, weights_only=True)
            done = saved["done"]
            for key, part in parts.items():
                part.load_state_dict(saved[key])
        first = rank_and_world()[0] == 0
        previous, last_checkpoint, shown = time.monotonic(), done["seconds"], {}
        with tqdm(
            total=100,
            initial=round(100 * length.progress(done), 2),
            desc=name,
            bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed} {postfix}",
            mininterval=10,
            disable=not first,
        ) as bar:
            while (progress := _of_rank_zero(length.progress(done))) < 1:
                values = step(done["steps"], progress)
                shown |= {k: 0.95 * shown.get(k, v) + 0.05 * v for k, v in values.items()}
                now = time.monotonic()
                done = {"steps": done["steps"] + 1, "seconds": done["seconds"] + now - previous}
                bar.update(100 * (length.progress(done) - progress))
                bar.set_postfix(
                    {"step": done["steps"], **{k: f"{v:.4f}" for k, v in shown.items()}},
                    refresh=False,
                )
                previous = now
                if not first:
                    continue
                if done["steps"] % 20 == 0:
                    self.log(stage=name, **done, **shown)
                if (
                    done["seconds"] - last_checkpoint > 60 * checkpoint_minutes
                    or length.progress(done) >= 1
                ):
                    save_atomically(
                        {"done": done, **{k: p.state_dict() for k, p in parts.items()}}, path
                    )
                    after_checkpoint(length.progress(done))
                    last_checkpoint, previous = done["seconds"], time.monotonic()
        return done


def stages_table(log: Path) -> str:
    """One row per stage: steps and minutes on the clock, from the last line that each wrote."""
    last = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if "steps" in record:
            last[record["stage"]] = record
    rows = [f"| {name} | {r['steps']} | {r['seconds'] / 60:.1f} |" for name, r in last.items()]
    return "\n".join(["| stage | steps | minutes |", "| --- | --- | --- |", *rows])


def parameters_of(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
