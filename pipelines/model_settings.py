"""A model's configuration as YAML or JSON has it, made into a `ModelConfig`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accel.errors import AccelError, nearest
from accel.pipelines.host import ModelConfig


def model_config(data: Mapping[str, Any]) -> ModelConfig:
    """Lists become tuples; a key that is missing or unknown is named."""
    known = [f.name for f in fields(ModelConfig)]
    for key in data:
        if key not in known:
            raise AccelError(f"a model has no setting {key!r}; {nearest(str(key), known)}")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return ModelConfig(**settings)
    except TypeError as error:
        raise AccelError(f"the model's configuration is not whole: {error}") from error
