import subprocess
import sys

import pytest

HEAVY = ("triton", "diffusers", "transformers", "cv2", "timm", "xformers", "hydra", "optuna")
PROGRAM = """
import sys
{statement}
assert not (loaded := sorted(set({heavy}) & set(sys.modules))), loaded
if "torch" in sys.modules:
    import torch
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import accel; accel.__version__; dir(accel)",
        "import accel; accel.Plan; accel.Schedule; accel.Layout; accel.step; accel.recipe",
        "import accel.plan, accel.router, accel.recipes, accel.cost, accel.run_summary",
        "import accel.kernels.attention, accel.estimators, accel.metrics, accel.context",
    ],
)
def test_the_core_needs_neither_models_nor_a_gpu(statement):
    program = PROGRAM.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_front_door_itself_needs_no_torch():
    program = "import sys, accel; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    import accel

    assert all(getattr(accel, name) is not None for name in accel.__all__)
    with pytest.raises(AttributeError, match="module 'accel' has no attribute 'enalbe'"):
        _ = accel.enalbe
