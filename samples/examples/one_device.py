"""Accelerate an unmodified diffusers pipeline by a plan, and see what the plan did.

python samples/examples/one_device.py [plan file or recipe name] [prompt]
"""

import sys
import time
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_gif
from PIL import Image

import accel

SAMPLES = Path(__file__).resolve().parent.parent
CALL = {
    "height": 64,
    "width": 64,
    "num_frames": 33,
    "num_inference_steps": 30,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
    "output_type": "pil",
}


def generate(pipe: WanPipeline, prompt: str) -> tuple[list[Image.Image], float]:
    """One video as frames, and the seconds it took; always from the same noise."""
    start = time.perf_counter()
    frames = pipe(prompt, generator=torch.Generator().manual_seed(0), **CALL).frames[0]
    return frames, time.perf_counter() - start


def main(plan: str, prompt: str) -> None:
    """Dense, accelerated, and what the plan did; two GIFs in the current folder."""
    pipe = WanPipeline.from_pretrained(SAMPLES / "models" / "wan-digits")
    dense, dense_seconds = generate(pipe, prompt)
    accel.enable(pipe, plan)
    fast, fast_seconds = generate(pipe, prompt)
    print(accel.summary(pipe))
    print(f"dense {dense_seconds:.1f} s, accelerated {fast_seconds:.1f} s")
    for name, frames in (("dense", dense), ("accelerated", fast)):
        big = [f.resize((256, 256), Image.Resampling.NEAREST) for f in frames]
        print("written:", export_to_gif(big, f"{name}.gif", fps=12))


if __name__ == "__main__":
    given = sys.argv[1:]
    default = str(SAMPLES / "plans" / "wan-digits.json")
    main(given[0] if given else default, given[1] if len(given) > 1 else "a seven moving left")
