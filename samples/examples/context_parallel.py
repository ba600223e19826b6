"""One video by several devices, which share every attention call, accelerated by a plan.

Here, on two CPU processes and the sample model (about two minutes on two cores):

torchrun --nproc-per-node 2 samples/examples/context_parallel.py

On a machine with four GPUs, and a model of another size:

torchrun --nproc-per-node 4 samples/examples/context_parallel.py \
    --model Wan-AI/Wan2.1-T2V-14B-Diffusers --plan sparsed \
    --size 81 720 1280 --steps 50 --guidance 5 --text 512
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video

import accel

SAMPLES = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SAMPLES / "models" / "wan-digits"))
    parser.add_argument("--plan", default=str(SAMPLES / "plans" / "wan-digits.json"))
    parser.add_argument("--prompt", default="a seven moving left")
    parser.add_argument("--size", nargs=3, type=int, default=(33, 64, 64), help="frames, h, w")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--text", type=int, default=64, help="tokens of text")
    return parser.parse_args()


def start() -> torch.device:
    """Join the other processes; the device of this one."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        return device
    # diffusers counts accelerators, and a CPU is none
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("cpu:gloo")
    return torch.device("cpu")


def loaded(name: str, device: torch.device) -> WanPipeline:
    """The pipeline, with its transformer's tokens shared out over the processes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = AutoencoderKLWan.from_pretrained(name, subfolder="vae", dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(name, vae=vae, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=dist.get_rank() > 0)
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    pipe.transformer.enable_parallelism(config=config)
    return pipe


def generate(pipe: WanPipeline, asked: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """The video [frames, 3, h, w] in [0, 1], and the seconds it took; always from one noise."""
    frames, height, width = asked.size
    dist.barrier()
    start = time.perf_counter()
    video = pipe(
        asked.prompt,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        max_sequence_length=asked.text,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[0]
    return video.float().cpu(), time.perf_counter() - start


def main(asked: argparse.Namespace) -> None:
    """Dense, accelerated, and what the plan did on this rank; two files in the current folder."""
    pipe = loaded(asked.model, start())
    dense, dense_seconds = generate(pipe, asked)
    accel.enable(pipe, asked.plan)  # on every rank, before or after enable_parallelism
    fast, fast_seconds = generate(pipe, asked)
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            print(accel.summary(pipe), flush=True)
    if dist.get_rank() == 0:
        psnr = -10 * (fast - dense).square().mean().log10()
        print(
            f"{dist.get_world_size()} processes: dense {dense_seconds:.1f} s, accelerated"
            f" {fast_seconds:.1f} s, {psnr:.1f} dB to dense"
        )
        for name, video in (("dense", dense), ("accelerated", fast)):
            images = list(video.permute(0, 2, 3, 1).numpy())
            print("written:", export_to_video(images, f"{name}.mp4", fps=16))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(arguments())
