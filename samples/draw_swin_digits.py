"""Draw more canvases of swin-digits than its folder has, for a search or a comparison.

    python samples/draw_swin_digits.py --canvases 72 --out outputs/canvases/calibration
    accel-search model=swin-digits model.calibration_images=outputs/canvases/calibration ...

Scans are held-out ones, as in the committed canvases; the indices are others than theirs.
`evaluate_swin_digits.py` draws those from 1000 on.
"""

import argparse
from pathlib import Path

from swin_digits_model import FILES, draw_canvases
from tqdm import tqdm

FIRST = 200


def main(canvases: int, first: int, out: Path) -> None:
    """Write canvases `first` and following to `out`."""
    committed = {index for indices in FILES.values() for index in indices}
    if committed & {*range(first, first + canvases)}:
        raise SystemExit(
            f"canvases {first} to {first + canvases - 1} are among the committed ones: give a"
            f" --first from {max(committed) + 1} on"
        )
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} holds files already: give another --out, or empty it")
    draw_canvases(out, tqdm(range(first, first + canvases), desc="drawing", unit="canvas"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canvases", type=int, default=72)
    parser.add_argument("--first", type=int, default=FIRST, help="index of the first canvas")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    main(**vars(parser.parse_args()))
