"""Write the model card of swin-digits from the files of its training and evaluation.

python samples/swin_digits_card.py --command "python samples/train_swin_digits.py --minutes 60"
"""

import argparse
import json
import re
from datetime import date
from pathlib import Path

from digit_canvases import CANVAS
from swin_digits_model import FILES, SIZE_ARGUMENTS, WINDOW, swin_of
from swin_digits_training import DENSE
from training import parameters_of, stages_table

from accel.pipelines.provenance import versions
from accel.pipelines.vision import VisionPipeline

HERE = Path(__file__).parent
FRONT = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-segmentation
---
"""


def _iou_table(evaluation: dict) -> str:
    rows = ["| class | IoU |", "| --- | ---: |"]
    rows += [f"| {name} | {value:.1%} |" for name, value in evaluation["iou"].items()]
    return "\n".join([*rows, f"| **mean** | **{evaluation['miou']:.1%}** |"])


def _sizes_table(evaluation: dict) -> str:
    rows = ["| height, pixels | digits | right |", "| --- | ---: | ---: |"]
    for name, row in evaluation["by_size"].items():
        right = "-" if row["right"] is None else f"{row['right']:.1%}"
        rows.append(f"| {name} | {row['digits']} | {right} |")
    return "\n".join(rows)


def _keeps(evaluation: dict) -> str:
    told = ""
    if evaluation["keeps"]:
        found = {"1": evaluation["miou"], **evaluation["keeps"]}
        row = ", ".join(f"{keep}: {value:.1%}" for keep, value in found.items())
        told += f"\nmIoU with the same keep of windows in every block: {row}.\n"
    if evaluation["plans"]:
        found = {f"`{name}`": value for name, value in evaluation["plans"].items()}
        row = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
        told += f"\nmIoU by plans: {row}.\n"
    return told


def _plain(table: str) -> str:
    """A stage of tuning by its name alone, without those of its plans."""
    return re.sub(r"\btune(-[0-9a-f]{8})+", "tune", table)


def _right_table(log: Path) -> str:
    """The last running mean of every stage and size of canvas."""
    last: dict[tuple[str, int], float] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        for key in (k for k in record if k.startswith("right_")):
            last[record["stage"], int(key[6:])] = record[key]
    rows = ["| stage | canvas, pixels | digits' pixels right |", "| --- | ---: | ---: |"]
    rows += [f"| {stage} | {size} | {value:.1%} |" for (stage, size), value in last.items()]
    return "\n".join(rows)


def card(model: Path, log: Path, command: str, notes: str) -> str:
    """The text of the card."""
    e = json.loads((model / "evaluation.json").read_text())
    pipe = VisionPipeline.from_pretrained(model)
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    dims, depths, heads = (SIZE_ARGUMENTS[k] for k in ("embed_dim", "depths", "num_heads"))
    empty = ", ".join(f"{share:.0%}" for share in e["background_windows"].values())
    first = DENSE.phases[0].size
    given = {"keeps": e["keeps"], "plans": e["plans"]}
    more = "".join(f" \\\n        --{name} {' '.join(of)}" for name, of in given.items() if of)
    files = " and ".join(f"{len(numbers)} in `{name}`" for name, numbers in FILES.items())
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""{FRONT}
# swin-digits

A small trained Swin that gives every pixel of a large canvas its class: one of ten handwritten
digits, or the ground. Most windows of a canvas hold nothing of interest, and which they are differs
from image to image. It exists so that pruning of windows can be searched, tested and shown on a
real timm Swin on two CPU cores; it is of no other use.

![canvases, what is right, and what is found](samples.png)

```python
import accel
from accel.pipelines.vision import VisionPipeline

pipe = VisionPipeline.from_pretrained("samples/models/swin-digits")
classes = pipe("samples/models/swin-digits/test/000.png").labels  # [1, {CANVAS}, {CANVAS}]
accel.enable(pipe, "samples/plans/swin-digits.json")  # some of the windows
```

## Data

The 8x8 scans of the UCI optical digits (Alpaydin and Kaynak, 1998) that ship with scikit-learn, one
to eight on a canvas of {CANVAS} x {CANVAS} pixels, 20 to 140 pixels high, turned, sheared and
stretched, in ink of several colours, on paper or a blackboard. Around them rulings, stains, long
strokes, scribbles that look like writing, uneven light and grain; all of that is background. Every
fifth scan is held out. `samples/digit_canvases.py` makes canvas `(seed, index)`.

Committed canvases of held-out scans: {files}. `NNN-classes.png` has the class of
every pixel of `NNN.png` as its grey level: 0 for the ground, 1 + n for the digit n.

## Architecture

{parameters_of(pipe.model) / 1e6:.2f} M parameters, {size:.1f} MiB in float16.
timm's `{type(swin_of(pipe)).__name__}` with depths {depths}, width {dims}, heads {heads} and
windows of {WINDOW} x {WINDOW} tokens of 4 x 4 pixels: {(CANVAS // 4 // WINDOW) ** 2} windows in the
first stage. Head: `accel.pipelines.vision.Segmenter`, a projection of all four stages to
{pipe.config.head_width} channels, their sum, and a classifier.

## Training

    {command}

{e["device"]}, no accelerator, {date.today():%Y-%m-%d}; {used}.
Muon for matrices, AdamW for the rest, moving averages of the weights; cross-entropy with dice. The
stage `dense` begins with canvases of {first} pixels that are full of digits. In the stage `adapt`
(SparseViT, arXiv 2303.17605) every step computes another share of the windows, so that any keeps
can be judged without training for them; in `tune` keeps of plans that were found take turns
with all windows (see `samples/swin_digits_training.py`).

{_plain(stages_table(log))}

Running means at the end, of training canvases:

{_plain(_right_table(log))}

{notes}
## Evaluation

    python samples/evaluate_swin_digits.py --canvases {e["canvases"]}{more}

Dense, {e["canvases"]} other canvases of held-out scans with {e["digits"]} digits. IoU is of all
canvases together. {e["digits_right"]:.1%} of the digits are right: most of their pixels have their
class. Of the windows of the four stages {empty} show no digit.

{_iou_table(e)}

{_sizes_table(e)}

mIoU of the {e["test_files"]["images"]} canvases in `test`: {e["test_files"]["miou"]:.1%}. One
canvas takes {e["seconds"]} s.
{_keeps(e)}
## Limits

It knows ten digits and one kind of clutter. Other sizes run (`pipe.set_input_size`) but only
{first} and {CANVAS} pixels were trained.

## Licence

Apache-2.0 for weights and code. Digits: Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository (CC BY 4.0), through scikit-learn.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "swin-digits")
    parser.add_argument("--log", type=Path, default=HERE / ".work" / "swin-digits" / "log.jsonl")
    parser.add_argument("--command", required=True, help="the command that trained the weights")
    parser.add_argument(
        "--notes", default="", help="a paragraph on what differed from the command above"
    )
    options = parser.parse_args()
    (options.model / "README.md").write_text(
        card(options.model, options.log, options.command, options.notes)
    )
