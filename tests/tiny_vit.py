"""Plain vision transformers of timm, cut to a few thousand random weights, and plans for them."""

import timm
import torch

import accel
from accel.choice import DENSE
from accel.pipelines.adapters import geometry_of
from accel.pipelines.handle import HANDLE
from accel.plan import Plan
from accel.schedule import Schedule
from accel.token_reduction import TokenReduction

# the architectures by name: patch, and whether they have a class token
ARCHITECTURES = {
    "vit_tiny_patch16_224": (16, True),
    "vit_small_patch16_224": (16, True),
    "deit_tiny_distilled_patch16_224": (16, True),
    "deit3_small_patch16_224": (16, True),
    "vit_small_patch14_reg4_dinov2": (14, True),
    "eva02_tiny_patch14_224": (14, True),
    "vit_small_patch16_dinov3": (16, True),
    "vit_base_patch16_siglip_224": (16, False),
}
DEPTH = 4
KEEPS = (0.8, None, 0.5, 0.4)
MERGE = {"method": "merge"}
MASS = {"method": "fuse", "score": "mass"}
CLASS = {"method": "fuse", "score": "class", "proportional": False}


def build(name="vit_tiny_patch16_224", rows=5, columns=7, depth=DEPTH, **changes):
    """A narrow model of an architecture for images of `rows` x `columns` patches.

    All weights are random, those of norms, scales and prefix tokens too, so that leaving one out
    shows.
    """
    torch.manual_seed(0)
    patch = ARCHITECTURES[name][0]
    cut = {"depth": depth, "embed_dim": 24, "num_heads": 3, "num_classes": 11}
    cut = {**cut, "img_size": (rows * patch, columns * patch), **changes}
    model = timm.create_model(name, **cut).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def images(model, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


def plan_of(model, keeps, **how):
    """A plan of token keeps alone, one for each block; None: not named."""
    geometry = geometry_of(model)
    named = {s.name: k for s, k in zip(geometry.sites, keeps, strict=True) if k is not None}
    return Plan.uniform(
        "tokens",
        geometry,
        DENSE,
        schedule=Schedule(dense_start=0.0),
        tokens=TokenReduction(named, **how),
    )


def error(found, expected):
    """Relative, in the norm."""
    return float((found - expected).norm() / expected.norm())


def enable(model, keeps=KEEPS, **how):
    return accel.enable(model, plan_of(model, keeps, **how), strict=True)


def blocks_of(model):
    """What took the blocks of an enabled model."""
    return getattr(model, HANDLE)._interception.taken
