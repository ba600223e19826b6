"""Small windowed models of timm, plans that prune them, and the plain computation of a plan."""

import copy
import io
import pickle

import timm
import torch

import accel
from accel.choice import DENSE
from accel.pipelines.adapters import denoisers_of, geometry_of
from accel.pipelines.enable import session_of
from accel.plan import Plan
from accel.schedule import Schedule
from accel.window_keeps import WindowKeeps

TINY = {"embed_dim": 16, "depths": (2, 4, 2), "num_heads": (1, 2, 4), "num_classes": 5}
SMALL = {**TINY, "window_size": 4, "img_size": (64, 80)}
MAKERS = {
    "swin": ("swin_tiny_patch4_window7_224", SMALL),
    "swin any size": ("swin_tiny_patch4_window7_224", {**SMALL, "strict_img_size": False}),
    "swinv2": ("swinv2_tiny_window8_256", SMALL),
    "swinv2 any size": ("swinv2_tiny_window16_256", {**SMALL, "strict_img_size": False}),
    "swinv2 cr": ("swinv2_cr_tiny_224", {**SMALL, "extra_norm_period": 3}),
    "swinv2 cr any size": ("swinv2_cr_tiny_224", {**SMALL, "strict_img_size": False}),
    "sam": (
        "samvit_base_patch16_224",
        {
            "img_size": (48, 64),
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 5,
            "num_heads": 2,
            "window_size": 5,
            "global_attn_indexes": (2,),
            "num_classes": 5,
            "init_values": 0.5,
        },
    ),
    "hiera": (
        "hiera_tiny_224",
        {
            "img_size": (64, 96),
            "embed_dim": 16,
            "stages": (3, 3, 2, 1),
            "num_classes": 5,
            "init_values": 0.5,
        },
    ),
    "hieradet": (
        "sam2_hiera_tiny",
        {
            "embed_dim": 16,
            "stages": (2, 3, 3, 2),
            "window_spec": (4, 2, 4, 2),
            "global_att_blocks": (6,),
            "num_classes": 5,
            "init_values": 0.5,
        },
    ),
}
WHOLE = (64, 96)  # of models that have no size


def windowed(name, **changes):
    """A model whose weights are large enough for images to differ."""
    torch.manual_seed(7)
    made, args = MAKERS[name]
    return randomised(timm.create_model(made, **{**args, **changes}).eval())


def randomised(model, std=0.15):
    """The model with random norms and biases too, which timm initialises to what hides a block."""
    for key, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
        elif "norm" in key or "bias" in key:
            torch.nn.init.normal_(weight, mean=float("weight" in key), std=0.1)
    return model


def copies_of(model):
    """A deep copy, what a pickle gives, and what a file of torch gives."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    return copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded


def net_of(name, kind="list", **changes):
    """What `features_only` makes of a model, with the weights of `windowed`."""
    made, args = MAKERS[name]
    args = {**args, "features_only": True, "feature_cls": kind, **changes}
    net = timm.create_model(made, **args).eval()
    denoisers_of(net)[0].load_state_dict(windowed(name).state_dict(), strict=False)
    return net


def images(model_name, batch=3, seed=1, size=None):
    size = size or MAKERS[model_name][1].get("img_size", WHOLE)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, size[0] // 8, size[1] // 8, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def prunable(model):
    """Sites whose blocks can leave windows out."""
    from accel.pipelines.window_hosts import host_block

    model = denoisers_of(model)[0]
    sites = [site.name for site in geometry_of(model).sites]
    paths = {site: site.rpartition(".")[0] for site in sites}
    blocks = {s: host_block(model, model.get_submodule(path), path) for s, path in paths.items()}
    return [site for site, block in blocks.items() if block.obstacle is None]


def plan_of(model, keeps, score="norm_of_means"):
    """A plan of these keeps; one number is for all that can be pruned."""
    if not isinstance(keeps, dict):
        keeps = dict.fromkeys(prunable(model), keeps)
    schedule = Schedule(dense_start=0.0)
    windows = WindowKeeps(keeps, score)
    return Plan.uniform("pruned", geometry_of(model), DENSE, schedule=schedule, windows=windows)


def pruned(model, keeps, score="norm_of_means"):
    return accel.enable(model, plan_of(model, keeps, score))


def interception(model):
    return denoisers_of(model)[0]._accel._interception


def gathering(model):
    """The model with all of its windows gathered and scattered back."""
    pruned(model, {})
    interception(model).gather_all = True
    return model


def session(model):
    return session_of(denoisers_of(model)[0])


def falling(model, keeps=(0.7, 0.5, 0.34)):
    """Keeps that fall from pair to pair of a stage."""
    found: dict[str, float] = {}
    for stage in interception(pruned(model, {})).stages:
        number = 0
        for block in stage.blocks:
            if block.host.obstacle is None:
                found[block.site] = keeps[min(number // 2, len(keeps) - 1)]
                number += 1
    accel.disable(model)
    return found
