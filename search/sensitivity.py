"""How much a unit of harm in each step band changes what comes out.

Early steps settle the composition, and every later one builds on it, so the same error costs more
there. A band's sensitivity is found by a run in which that band alone is sparse (its probe) beside
a dense one, both from the same noise:

    sensitivity = relative squared error of the run / harm of the probe

with the harm as the calibration predicts it: the sum of relative squared errors over the band's
steps, sites and heads. Small errors of different steps add up in the square, so over the bands

    relative squared error of a plan's run = sum over bands of  sensitivity * harm

which is also how its quality in dB is predicted.
"""

from collections.abc import Sequence
from math import log10
from statistics import mean

from accel.metrics import PSNR_CAP_DB

LEAST_ERROR = 10 ** (-PSNR_CAP_DB / 10)  # runs closer than this are equal


def sensitivity(quality: Sequence[float], harm: float) -> float:
    """The error of a mean quality (dB) over the harm; tiny for a probe that changed nothing."""
    return 10 ** (-mean(quality) / 10) / (harm + LEAST_ERROR)


def predicted_quality(error: float) -> float:
    """`-10 log10(error)` in dB, at most 100."""
    return -10 * log10(max(error, LEAST_ERROR))
