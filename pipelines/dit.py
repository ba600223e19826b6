"""Image diffusion transformers: where their sites are, and where text and image tokens stand."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from accel.layout import Grid, Layout
from accel.layouts import Layouts
from accel.pipelines.adapters import Adapter, Call, refuse, register
from accel.pipelines.token_order import Run, image_and_rest, image_grid, runs_of_mask

DOUBLE_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"
Z_IMAGE_MULTIPLE = 32  # image and caption are each filled up to a multiple of it

refuse(
    "its attention is linear in the number of tokens, so there are no blocks to leave out",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
)


def _image_alone(model: Any, call: Call) -> Layout:
    """DiT, PixArt: text is cross-attended, or there is none."""
    return Layout.of(image_grid(model, call["hidden_states"]))


def _flux(model: Any, call: Call) -> Layout | str:
    """Flux, Flux2: [text, image, reference images] (Kontext, Flux2) in both kinds of block."""
    found = image_and_rest(call["img_ids"])
    if isinstance(found, str):
        return found
    text, (grid, rest) = call["encoder_hidden_states"].shape[1], found
    return Layout.join([("text", text), grid, ("reference", rest)])


def _sd3(model: Any, call: Call) -> Layouts:
    """SD3: [image, text]; the second attention of SD3.5's dual blocks has the image alone."""
    grid = image_grid(model, call["hidden_states"])
    joint = Layout.of(grid, text_after=call["encoder_hidden_states"].shape[1])
    dual = model.config.dual_attention_layers or ()
    alone = {f"transformer_blocks.{i}.attn2": Layout.of(grid) for i in dual}
    return Layouts((joint,), alone)


def _qwen(model: Any, call: Call) -> list[Layout] | str:
    """QwenImage: [text, padding, image, reference images], in layers several generated images.

    img_shapes: for each sample its (frames, rows, columns); for editing, references come after.
    """
    shapes, mask = call["img_shapes"], call["encoder_hidden_states_mask"]
    batch, length = call["encoder_hidden_states"].shape[:2]
    texts: list[list[Run]] = [[("text", length)]] * batch
    if mask is not None:
        texts = [runs_of_mask(row) for row in mask.bool().tolist()]
    layouts = []
    for sample, text in enumerate(texts):
        images = shapes[sample % len(shapes)]
        images = [images] if isinstance(images[0], int) else images
        grids: list[Grid] = [(t, h, w) for t, h, w in images]
        layered = getattr(model.config, "use_layer3d_rope", False)
        generated = len(grids) - 1 if layered else 1
        rest = sum(prod(grid) for grid in grids[generated:])
        layouts.append(Layout.join([*text, *grids[:generated], ("reference", rest)]))
    return layouts


def _z_image(model: Any, call: Call) -> list[Layout] | str:
    """Z-Image: [image, filling, caption, filling, padding to the longest of the batch].

    What fills up image and caption are learned tokens that are attended, as text is.
    """
    if not isinstance(call["x"][0], Tensor):
        return "Z-Image's mode of several images has no layout yet"
    p, f = call["patch_size"] or 2, call["f_patch_size"] or 1
    grids = [patched_image(x, f, p) for x in call["x"]]
    fill = [-prod(grid) % Z_IMAGE_MULTIPLE for grid in grids]
    captions = [len(c) + -len(c) % Z_IMAGE_MULTIPLE for c in call["cap_feats"]]
    texts = [a + b for a, b in zip(fill, captions, strict=True)]
    lengths = [prod(grid) + text for grid, text in zip(grids, texts, strict=True)]
    return [
        Layout.of(grid, text_after=text, padding=max(lengths) - length)
        for grid, text, length in zip(grids, texts, lengths, strict=True)
    ]


def patched_image(x: Tensor, f: int, p: int) -> Grid:
    """The grid of one of Z-Image's latents [channels, t, h, w]."""
    return x.shape[1] // f, x.shape[2] // p, x.shape[3] // p


def _hidream(model: Any, call: Call) -> Layout | str:
    """HiDream: [image, what it is filled up with where it is not square, text].

    text: T5's, the last layer of Llama's, and that of the block. Filling is attended (its keys are
    zero, which is no mask), so it counts as text.
    """
    config = model.config
    x, t5, llama = (
        call[name]
        for name in ("hidden_states", "encoder_hidden_states_t5", "encoder_hidden_states_llama3")
    )
    if x.ndim != 4:
        return "HiDream's latents are cut into patches before the call; pass layout="
    grid = image_grid(model, x)
    filling = 0 if grid[1] == grid[2] else prod(config.max_resolution) // config.patch_size**2
    filling = max(filling - prod(grid), 0)
    return Layout.of(grid, text_after=filling + t5.shape[1] + 2 * llama.shape[-2])


def _auraflow(model: Any, call: Call) -> Layout:
    """AuraFlow: [register tokens, text, image]."""
    registers: int = model.register_tokens.shape[1]
    text = registers + call["encoder_hidden_states"].shape[1]
    return Layout.of(image_grid(model, call["hidden_states"]), text_before=text)


def _lumina2(model: Any, call: Call) -> list[Layout]:
    """Lumina2: [caption, image, padding]: a sample's image follows its own caption at once."""
    grid = image_grid(model, call["hidden_states"])
    captions = call["encoder_attention_mask"].sum(1).tolist()
    return [Layout.of(grid, text_before=n, padding=max(captions) - n) for n in captions]


def _lumina2_heads(module: Any) -> tuple[int, int]:
    heads: int = module.heads
    return heads, module.to_q.out_features // heads


def _image(config: Any, channels: int | None = None) -> Tensor:
    side = config.patch_size
    return torch.zeros(1, channels or config.in_channels, 2 * side, 2 * side)


def _ids(*axes: int, width: int) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(axes[0]), torch.arange(axes[1])).float()
    ids = torch.zeros(len(grid), width)
    ids[:, 1:3] = grid
    return ids


def _flux_probe(model: Any) -> dict[str, Any]:
    config = model.config
    axes = len(config.axes_dims_rope)
    return {
        "hidden_states": torch.zeros(1, 6, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, 2, config.joint_attention_dim),
        "timestep": torch.zeros(1),
        "img_ids": _ids(2, 3, width=axes),
        "txt_ids": torch.zeros(2, axes),
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
        "joint_attention_kwargs": _image_prompts(model),
    }


def _image_prompts(model: Any) -> dict[str, Any] | None:
    """What the processors of a loaded IP-Adapter ask for, one image for each adapter."""
    for processor in model.attn_processors.values():
        adapters = getattr(processor, "to_k_ip", None)
        if adapters is not None:
            return {"ip_hidden_states": [torch.zeros(1, 1, a.in_features) for a in adapters]}
    return None


def _pooled_flux_probe(model: Any) -> dict[str, Any]:
    pooled = torch.zeros(1, model.config.pooled_projection_dim)
    return {**_flux_probe(model), "pooled_projections": pooled}


def _sd3_probe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _image(config),
        "encoder_hidden_states": torch.zeros(1, 2, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "timestep": torch.zeros(1, dtype=torch.long),
    }


def _qwen_probe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.zeros(1, 6, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, 2, config.joint_attention_dim),
        "timestep": torch.zeros(1),
        "img_shapes": [[(1, 2, 3)]],
        "guidance": torch.zeros(1) if config.guidance_embeds else None,
        "additional_t_cond": torch.zeros(1, dtype=torch.long)
        if config.use_additional_t_cond
        else None,
    }


def _pixart_probe(model: Any) -> dict[str, Any]:
    config = model.config
    size = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    extra = size if model.use_additional_conditions else dict.fromkeys(size)
    return {
        "hidden_states": _image(config),
        "encoder_hidden_states": torch.zeros(1, 2, config.caption_channels),
        "timestep": torch.zeros(1, dtype=torch.long),
        "added_cond_kwargs": extra,
    }


def _dit_probe(model: Any) -> dict[str, Any]:
    zero = torch.zeros(1, dtype=torch.long)
    return {"hidden_states": _image(model.config), "timestep": zero, "class_labels": zero}


def _z_image_probe(model: Any) -> dict[str, Any]:
    config = model.config
    p, f = config.all_patch_size[0], config.all_f_patch_size[0]
    return {
        "x": [torch.zeros(config.in_channels, f, 2 * p, 3 * p)],
        "t": torch.zeros(1),
        "cap_feats": [torch.zeros(2, config.cap_feat_dim)],
        "patch_size": p,
        "f_patch_size": f,
    }


def _hidream_probe(model: Any) -> dict[str, Any]:
    config = model.config
    t5, llama = config.caption_channels
    return {
        "hidden_states": _image(config),
        "timesteps": torch.zeros(1),
        "encoder_hidden_states_t5": torch.zeros(1, 2, t5),
        "encoder_hidden_states_llama3": torch.zeros(max(config.llama_layers) + 1, 1, 2, llama),
        "pooled_embeds": torch.zeros(1, config.text_emb_dim),
    }


def _auraflow_probe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _image(config),
        "encoder_hidden_states": torch.zeros(1, 2, config.joint_attention_dim),
        "timestep": torch.zeros(1),
    }


def _lumina2_probe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _image(config),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 2, config.cap_feat_dim),
        "encoder_attention_mask": torch.ones(1, 2, dtype=torch.long),
    }


for _adapter in (
    Adapter(
        classes=("FluxTransformer2DModel",),
        sites=DOUBLE_AND_SINGLE,
        reads=("encoder_hidden_states",),
        contents=("img_ids",),
        layout=_flux,
        probe=_pooled_flux_probe,
    ),
    Adapter(
        classes=("Flux2Transformer2DModel",),
        sites=DOUBLE_AND_SINGLE,
        reads=("encoder_hidden_states",),
        contents=("img_ids",),
        layout=_flux,
        probe=_flux_probe,
    ),
    Adapter(
        classes=("SD3Transformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn2?",
        reads=("encoder_hidden_states",),
        layout=_sd3,
        probe=_sd3_probe,
    ),
    Adapter(
        classes=("QwenImageTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        reads=("encoder_hidden_states", "img_shapes"),
        contents=("encoder_hidden_states_mask",),
        layout=_qwen,
        probe=_qwen_probe,
    ),
    Adapter(
        classes=("PixArtTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        layout=_image_alone,
        probe=_pixart_probe,
    ),
    Adapter(
        classes=("DiTTransformer2DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        layout=_image_alone,
        probe=_dit_probe,
    ),
    Adapter(
        classes=("ZImageTransformer2DModel",),
        sites=r"layers\.\d+\.attention",
        first="x",
        reads=("cap_feats", "patch_size", "f_patch_size"),
        layout=_z_image,
        probe=_z_image_probe,
    ),
    Adapter(
        classes=("HiDreamImageTransformer2DModel",),
        sites=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        reads=("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        layout=_hidream,
        probe=_hidream_probe,
    ),
    Adapter(
        classes=("AuraFlowTransformer2DModel",),
        sites=r"(joint|single)_transformer_blocks\.\d+\.attn",
        reads=("encoder_hidden_states",),
        layout=_auraflow,
        probe=_auraflow_probe,
    ),
    Adapter(
        classes=("Lumina2Transformer2DModel",),
        sites=r"layers\.\d+\.attn",
        contents=("encoder_attention_mask",),
        layout=_lumina2,
        probe=_lumina2_probe,
        heads=_lumina2_heads,
    ),
):
    register(_adapter)
