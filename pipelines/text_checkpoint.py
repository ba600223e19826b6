"""Text models as their checkpoints have them: folders and repositories of transformers."""

import os
from pathlib import Path
from typing import Any

from accel.errors import AccelError

__all__ = ["is_pipeline", "load_checkpoint"]

INDEX = "model_index.json"
HUB = ("revision", "token", "cache_dir")  # which file of a repository is meant
# of remote code, by what a masked diffusion model is published as
AUTO = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


def is_pipeline(path: str | os.PathLike[str], **load: Any) -> bool:
    """Whether a folder or repository holds a pipeline of diffusers rather than a model alone."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return (Path(path) / INDEX).is_file()
    where = {k: load[k] for k in HUB if k in load}
    found = cached_file(
        str(path),
        INDEX,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return found is not None


def load_checkpoint(path: str | os.PathLike[str], **load: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint, by the class that its configuration names.

    load: for transformers' `from_pretrained`, as dtype or device_map; `trust_remote_code=True` for
    a model whose code comes with it (LLaDA, Dream). Raises AccelError where no class is named.
    """
    import transformers

    shared = {k: load[k] for k in ("trust_remote_code", *HUB) if k in load}
    config: Any = transformers.AutoConfig.from_pretrained(path, **shared)
    remote = getattr(config, "auto_map", None) or {}
    names = [name for name in AUTO if name in remote] or list(config.architectures or ())
    model_class: Any = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise AccelError(
            f"the configuration of {str(path)!r} names no class of transformers, but"
            f" {config.architectures}; load the model yourself, and give it to"
            " MaskedDiffusionPipeline(model, tokenizer)"
        )
    model = model_class.from_pretrained(path, config=config, **load)
    return model, transformers.AutoTokenizer.from_pretrained(path, **shared)
