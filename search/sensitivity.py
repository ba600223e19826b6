"""How much a unit of harm in each step band changes the finished video.

Early steps settle the composition, and every later one builds on it, so the same error costs more
there. A band's sensitivity is found by a generation in which that band alone is sparse (its probe)
beside a dense one, both from the same noise:

    sensitivity = mean squared error of the video / harm of the probe

with the harm as the calibration predicts it: the sum of relative squared errors over the band's
steps, sites and heads. Small errors of different steps add up in the square, so over the bands

    mean squared error of a plan's video = sum over bands of  sensitivity * harm

which is also how its PSNR is predicted. Over prompts the error is that of their mean PSNR.
"""

import json
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from accel.files import write_atomically
from accel.metrics import PSNR_CAP_DB, capped, psnr
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host
from accel.plan import Plan

LEAST_ERROR = 10 ** (-PSNR_CAP_DB / 10)  # videos closer than this are equal


def measure_sensitivities(
    host: Host, probes: Mapping[int, tuple[Plan, float]], seed: int, path: Path
) -> list[float]:
    """The sensitivity of every band; probes: band -> the plan that is sparse there, and its harm.

    Every probe is generated for every calibration prompt; its PSNR is kept in `path` and what is
    there is not made again.
    """
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    prompts = host.config.calibration
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
                    of_prompt[str(band)] = capped(psnr(video, dense))
                    write_atomically(path, json.dumps(known, indent=1))
                bar.update()
    return [
        sensitivity([known[prompt][str(band)] for prompt in prompts], harm)
        for band, (_, harm) in probes.items()
    ]


def sensitivity(quality: Sequence[float], harm: float) -> float:
    """The error of a mean PSNR (dB) over the harm; 1 for a probe that changed nothing."""
    return 10 ** (-mean(quality) / 10) / (harm + LEAST_ERROR)


def predicted_psnr(error: float) -> float:
    """`-10 log10(error)` in dB, at most 100."""
    return -10 * log10(max(error, LEAST_ERROR))
