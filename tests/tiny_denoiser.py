"""A Wan transformer of a few thousand random weights, its calls, and plans for it."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import accel
from accel.choice import Choice
from accel.geometry import Geometry
from accel.pipelines.adapters import sites_of
from accel.plan import Plan
from accel.schedule import Schedule

GRID = (3, 5, 7)  # no block size divides its 105 tokens
BLOCK = (32, 16)
HEADS, HEAD_DIM, LAYERS = 3, 24, 2
SITES = tuple(f"blocks.{i}.attn1" for i in range(LAYERS))
ALWAYS = Schedule(dense_start=0.0)


def tiny_denoiser(**changes) -> WanTransformer3DModel:
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": LAYERS,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def inputs(batch: int = 1, grid: tuple[int, int, int] = GRID, seed: int = 0) -> dict:
    """One call's arguments; the patch is (1, 2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
    }


@torch.no_grad()
def call(model, step: int | None = None, total: int = 10, branch: str = "", **arguments) -> Tensor:
    """One forward; at a step that is said where one is given."""
    arguments = arguments or inputs()
    if step is None:
        return model(**arguments, return_dict=False)[0]
    with accel.step(step, total, branch):
        return model(**arguments, return_dict=False)[0]


def tiny_geometry(model=None) -> Geometry:
    return Geometry("WanTransformer3DModel", tuple(sites_of(model or tiny_denoiser())))


def tiny_plan(
    *choices: Choice, name: str = "tiny", schedule: Schedule = ALWAYS, **settings
) -> Plan:
    """One choice for all heads, or one for each of the heads, at every site."""
    choices = choices * HEADS if len(choices) == 1 else choices
    sites = dict.fromkeys(SITES, (choices,) * schedule.n_bands)
    settings = {"block": BLOCK, "schedule": schedule, **settings}
    return Plan.of(name, tiny_geometry(), sites, **settings)
