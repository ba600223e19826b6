"""Functions run on several processes that share a gloo group."""

import multiprocessing
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=60)  # for a rank that others wait for


def on_ranks(count: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `function(rank, *args)` gives on every rank; the first error of any is raised here.

    The function and its arguments are pickled; what it gives is saved in `folder`.
    """
    _start_server()
    store = Path(folder) / f"store-{uuid.uuid4().hex}"
    torch.multiprocessing.start_processes(
        _one, (count, function, store, args), nprocs=count, start_method="forkserver"
    )
    return [torch.load(f"{store}-{rank}", weights_only=False) for rank in range(count)]


def _start_server() -> None:
    """The process that others are forked from, once: it has imported `rank_process`."""
    multiprocessing.set_forkserver_preload(["rank_process"])
    here = Path(__file__).resolve().parent
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 tells the server no other way where that is
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), before or ""])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _one(rank: int, count: int, function: Callable, store: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    # diffusers divides by the number of accelerators; a CPU has none
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group(
        "cpu:gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    try:
        torch.save(function(rank, *args), f"{store}-{rank}")
    finally:
        dist.destroy_process_group()
