"""Small benchmarks: settings, cases and rows to make others from."""

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from accel.pipelines.bench.case import BenchSettings, Case
from accel.pipelines.bench.results import Row
from accel.pipelines.bench.settings import bench_settings

CASE = Case(shape="mine", batch=2, heads=3, tokens=301, dim=40, dtype="float32")


def delivered(*overrides) -> dict:
    """What `accel-bench` gets where nothing but `overrides` is typed."""
    with initialize_config_module("accel.configs", version_base="1.3"):
        return OmegaConf.to_container(compose("bench", overrides=[*overrides]), resolve=True)


def config(*overrides, shapes=None) -> dict:
    """What `accel-bench` gets, quick and on the CPU; `shapes` in place of those of the group."""
    quick = ["device=cpu", "rounds=2", "warm_up_ms=0", "sample_ms=0", "backends=[native,cpu]"]
    quick += ["blocks=[[64,32]]", "keeps=[1.0,0.25]", "checked_rows=16"]
    values = delivered(*quick, *overrides)
    shape = {"batch": 2, "heads": 3, "tokens": 301, "dim": 40, "dtypes": ["float32"]}
    return values | {"shapes": shapes or {"mine": shape}}


def settings(*overrides, shapes=None) -> BenchSettings:
    return bench_settings(config(*overrides, shapes=shapes))


def row(**changes) -> Row:
    """A row of attention that was timed."""
    fields = {
        "kernel": "attention", "backend": "native", "mode": "full", "shape": "mine", "batch": 1,
        "heads": 3, "tokens": 301, "dim": 40, "dtype": "float32", "keep": 0.25, "kept": 0.26,
        "block": (64, 32), "ms": {"median": 2.5, "p20": 2.0, "p80": 3.0}, "tflops": 0.5,
        "price": 0.5, "efficiency": 0.52, "own_efficiency": 0.75, "baseline": "sdpa",
        "error": 1e-7, "limit": 1e-5, "rounds": 7, "date": "2026-01-02",
    }  # fmt: skip
    return Row(**{**fields, **changes})


def qkv(batch=2, heads=3, tokens=301, dim=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    size = (batch, tokens, heads, dim)
    return tuple(torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for _ in "qkv")
