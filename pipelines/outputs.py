"""The kinds of output there are, by the word that a model's configuration has for them."""

from types import MappingProxyType

from accel.errors import AccelError, nearest
from accel.pipelines.frames_output import FramesOutput
from accel.pipelines.output import Output
from accel.pipelines.text_output import TextOutput
from accel.pipelines.vision_output import ClassesOutput

__all__ = ["OUTPUTS", "output_of"]

OUTPUTS = MappingProxyType(
    {kind.name: kind for kind in (FramesOutput(), TextOutput(), ClassesOutput())}
)


def output_of(name: str) -> Output:
    """The kind of output that `model.output` names."""
    if name not in OUTPUTS:
        raise AccelError(f"model.output {name!r} is unknown; {nearest(str(name), OUTPUTS)}")
    return OUTPUTS[name]
