"""How much a unit of harm in each step band changes the finished video.

Early steps settle the composition, and every later one builds on it, so the same error costs more
there. A band's sensitivity is found by a generation in which that band alone is sparse (its probe)
beside a dense one, both from the same noise:

    sensitivity = mean squared error of the video / harm of the probe

with the harm as the calibration predicts it: the sum of relative squared errors over the band's
steps, sites and heads. Small errors of different steps add up in the square, so over the bands

    mean squared error of a plan's video = sum over bands of  sensitivity * harm

which is also how its PSNR is predicted. The mean over prompts is geometric, as in a mean of PSNRs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log, log10
from pathlib import Path
from statistics import mean

import numpy as np
from tqdm import tqdm

from accel.files import write_atomically
from accel.metrics import PSNR_CAP_DB
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host, Video
from accel.plan import Plan

LEAST_ERROR = 10 ** (-PSNR_CAP_DB / 10)  # videos closer than this are equal


def measure_sensitivities(
    host: Host,
    probes: Mapping[int, tuple[Plan, float]],
    prompts: Sequence[str],
    seed: int,
    path: Path,
) -> list[float]:
    """The sensitivity of every band; probes: band -> the plan that is sparse there, and its harm.

    Every probe is generated for every prompt and kept in `path`; what is there is not made again.
    """
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    missing = [p for p in prompts if len(known.get(p, {})) < len(probes)]
    with tqdm(total=len(missing) * (len(probes) + 1), desc="probing", unit="video") as bar:
        for prompt in missing:
            dense = host.generate(prompt, seed)
            bar.update()
            of_prompt = known.setdefault(prompt, {})
            for band, (plan, _) in probes.items():
                if str(band) not in of_prompt:
                    with enabled(host.pipe, plan, check=False):
                        video = host.generate(prompt, seed)
                    of_prompt[str(band)] = _error(video, dense)
                    write_atomically(path, json.dumps(known, indent=1))
                bar.update()
    return [
        sensitivity((known[prompt][str(band)] for prompt in prompts), harm)
        for band, (_, harm) in probes.items()
    ]


def sensitivity(errors: Iterable[float], harm: float) -> float:
    """Geometric mean of a probe's errors over its harm; 1 for a probe without either."""
    error = exp(mean(log(e + LEAST_ERROR) for e in errors))
    return error / (harm + LEAST_ERROR)


def predicted_psnr(error: float) -> float:
    """`-10 log10(error)` in dB, at most 100."""
    return -10 * log10(max(error, LEAST_ERROR))


def _error(video: Video, dense: Video) -> float:
    return float(np.mean((video.astype(np.float64) - dense.astype(np.float64)) ** 2))
