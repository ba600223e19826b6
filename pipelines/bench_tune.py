"""Tiles of the Triton attention kernel, tried out on this device; what is fastest stays.

Tuned are calls in natural order that leave the rest out, on masks that keep a quarter of the blocks
in uneven rows. The winner goes into the user's own table (`accel.kernels.tiles`), which every later
call on a device like this one reads.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from accel.dense import usual_dense
from accel.errors import AccelError
from accel.kernels.attention import sparse_attention
from accel.kernels.tiles import (
    Tiles,
    TilesKey,
    candidates,
    choose_tiles,
    save_tiles,
    tiles_key,
    user_table_path,
)
from accel.pipelines.bench_contest import Rival, contest
from accel.pipelines.bench_gate import attention_gate
from accel.pipelines.bench_inputs import inputs_of, random_mask
from accel.pipelines.bench_settings import BenchSettings, Block, Case
from accel.pipelines.host import DTYPES

KEEP = 0.25
# how many times the winner is checked before it stays
CHECKS = 5


def tune(settings: BenchSettings) -> dict[TilesKey, Tiles]:
    """The fastest tiles for every case, block and precision; kept as soon as they are known.

    Raises AccelError where there is no GPU.
    """
    if settings.device.type != "cuda":
        raise AccelError(
            f"tune=true is for the Triton kernels of GPUs, and the device is {settings.device.type}"
        )
    major, minor = torch.cuda.get_device_capability(settings.device)
    best: dict[TilesKey, Tiles] = {}
    for case in settings.cases:
        for block in settings.blocks:
            for precision in settings.precisions:
                key = key_of(case, block, precision, 10 * major + minor)
                if key not in best:
                    best[key] = fastest_tiles(key, case, block, precision, settings)
    print(f"tiles: {user_table_path()}")
    return best


def key_of(case: Case, block: Block, precision: str, arch: int) -> TilesKey:
    """What the tiles of such a call are looked up by."""
    from accel.kernels.attention_triton import arithmetic

    halved = precision != "full" and case.dtype == "float32"
    return tiles_key(
        arch=arch,
        block=block,
        dim=case.dim,
        element_bytes=2 if halved else DTYPES[case.dtype].itemsize,
        arithmetic=arithmetic(precision, arch),
    )


@torch.no_grad()
def fastest_tiles(
    key: TilesKey, case: Case, block: Block, precision: str, settings: BenchSettings
) -> Tiles:
    """The candidate with the lowest price of those that are right; it is kept in the user's table.

    While it is tried a candidate stands there; an interruption leaves the best of those so far.
    """
    inputs = inputs_of(case, settings.device)
    mask = random_mask(case, block, KEEP, "uneven", settings.device)
    gate = attention_gate(inputs[0], mask, settings.checked_rows)
    run = partial(sparse_attention, mask=mask, precision=precision, backend="triton")
    rival = Rival(lambda: run, precision)
    # enough to tell candidates apart; the benchmark itself measures with care
    quick = replace(settings, rounds=3, warm_up_ms=20.0, sample_ms=10.0)
    before, prices = choose_tiles(key), dict[Tiles, float]()
    tried: Iterable[Tiles] = tqdm(
        candidates(key), desc=f"tiles for {case.shape} {case.dtype} {precision}", unit="tiles"
    )
    try:
        for tiles in tried:
            save_tiles({key: tiles})
            outcome = contest({"triton": rival}, gate, inputs, quick, usual_dense)["triton"]
            if outcome.price is not None:
                prices[tiles] = outcome.price
    finally:
        # what a compiler got wrong may show only now and then
        best = before
        while prices:
            best = min(prices, key=prices.__getitem__)
            save_tiles({key: best})
            errors = [gate.error(run(*inputs[0])) for _ in range(CHECKS)]
            if all(error <= gate.limit(precision) for error in errors):
                break
            del prices[best]
            best = before
        save_tiles({key: best})
    return best
