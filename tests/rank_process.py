"""What every process of a shared call has imported before it is forked: once, for all of them."""

# ruff: noqa: E402  what is said to the environment and to jaxtyping comes before the imports

import os

# tests of several processes are tests of the CPU's
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("accel", "beartype.beartype")

import diffusers.hooks.context_parallel
import diffusers.models.transformers.transformer_flux
import diffusers.models.transformers.transformer_qwenimage
import diffusers.models.transformers.transformer_wan  # noqa: F401

import accel.pipelines.enable  # noqa: F401
