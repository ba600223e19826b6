"""What a plan is worth: its quality against the dense run with the same prompts and noise, in dB.

Three fidelities, from free to true:

* `profile`: the predicted PSNR of the video, from the calibration alone.
* `steps`: a run of a few denoising steps, dense and with the plan; signal to error of the latents,
  -10 log10( |x - y|^2 / |y - mean y|^2 ). Schedules are in progress, so every band is in it.
* `whole`: a whole generation; PSNR of the video.

All but the first are deterministic for one device: the same plan is worth the same in every run.
A run with values that are not finite is worth the least there is, -100 dB.
"""

import hashlib
import io
from collections.abc import Sequence
from math import log10
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from accel.errors import AccelError, nearest
from accel.files import write_atomically
from accel.metrics import PSNR_CAP_DB, capped, psnr
from accel.pipelines.enable import enabled
from accel.pipelines.host import Host
from accel.plan import Plan

WORST_DB = -PSNR_CAP_DB
FIDELITIES = ("profile", "steps", "whole")


class Objective:
    """Generations with a plan against dense ones, which are kept in `folder`.

    steps: of a run of fidelity `steps`; key: names what dense runs depend on, model and device.
    """

    def __init__(
        self, host: Host, folder: Path, key: str, *, fidelity: str, steps: int, seed: int
    ) -> None:
        if fidelity not in FIDELITIES:
            raise AccelError(
                f"search.fidelity {fidelity!r} is unknown; {nearest(fidelity, FIDELITIES)}"
            )
        self._host = host
        self._folder = folder
        self._key = key
        self._seed = seed
        self.fidelity = fidelity
        self.steps = steps if fidelity == "steps" else host.steps

    def __call__(self, plan: Plan, prompts: Sequence[str]) -> float:
        """Mean over the prompts, in dB."""
        with enabled(self._host.pipe, plan, check=False, guard=False):
            found = [self._generate(prompt) for prompt in prompts]
        pairs = zip(found, map(self.dense, prompts), strict=True)
        return mean(self.quality(x, y) for x, y in pairs)

    def dense(self, prompt: str, known: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The host's own run of a prompt, made once; or kept, where the caller has it already."""
        what = f"{self._key} {self.fidelity} {self.steps} {self._seed} {prompt}"
        name = f"dense-{hashlib.sha256(what.encode()).hexdigest()[:12]}.npz"
        path = self._folder / "dense" / name
        if not path.is_file():
            buffer = io.BytesIO()
            run = self._generate(prompt) if known is None else known
            if not np.isfinite(run).all():
                raise AccelError(
                    f"the dense run of {prompt!r:.80} has values that are not finite, so nothing"
                    f" can be judged by it; take another dtype than {self._host.config.dtype}"
                )
            np.savez_compressed(buffer, found=run)
            write_atomically(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as file:
            return file["found"]

    def _generate(self, prompt: str) -> NDArray[np.float32]:
        if self.fidelity == "steps":
            return self._host.latents(prompt, self._seed, num_inference_steps=self.steps)
        return self._host.generate(prompt, self._seed)

    def quality(self, found: NDArray[np.float32], dense: NDArray[np.float32]) -> float:
        """Of a run beside the dense one, in dB: from -100, of a run that is broken, to 100."""
        if not np.isfinite(found).all():
            return WORST_DB
        if self.fidelity == "steps":
            return signal_to_error_db(found, dense)
        return max(WORST_DB, capped(psnr(found, dense)))


def signal_to_error_db(found: NDArray[np.float32], dense: NDArray[np.float32]) -> float:
    """`-10 log10(|x - y|^2 / |y - mean y|^2)`, from -100 to 100 dB."""
    error = float(np.square(found.astype(np.float64) - dense).sum())
    signal = float(np.square(dense.astype(np.float64) - dense.mean(dtype=np.float64)).sum())
    ratio_db = -10 * log10(max(error, 1e-30) / max(signal, 1e-30))
    return max(WORST_DB, min(ratio_db, PSNR_CAP_DB))
