"""Whether something stands in front of torch's functions, by private names of torch (2.4 to 2.15).

diffusers' perturbed guidance replaces `scaled_dot_product_attention` by a `TorchFunctionMode` while
it wants attention left out; a sparse kernel would run behind its back. torch has no public way to
ask for the modes that are on. Where these names are gone nothing is known, and nothing stands in
the way; `tests/accel/test_function_modes.py` fails then.
"""

try:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
except ImportError:  # another torch

    def in_force() -> bool:
        return False

else:

    def in_force() -> bool:
        """Whether a function mode is on, other than the one of `torch.set_default_device`."""
        return any(
            not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
        )


__all__ = ["in_force"]
