"""Write the model card of vit-digits from the files of its training and evaluation.

python samples/vit_digits_card.py --command "python samples/train_vit_digits.py --minutes 18"
"""

import argparse
import json
from datetime import date
from pathlib import Path

from digit_crops import CROP, CROP_SIZES
from training import parameters_of, stages_table
from vit_digits_model import FILES

from accel.pipelines.provenance import versions
from accel.pipelines.vision import VisionPipeline

HERE = Path(__file__).parent
FRONT = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---
"""


def _digits_table(evaluation: dict) -> str:
    rows = ["| digit | crops | right | else most often |", "| --- | ---: | ---: | --- |"]
    for word, row in evaluation["by_digit"].items():
        rows.append(f"| {word} | {row['crops']} | {row['right']:.1%} | {row['taken_for'] or '-'} |")
    return "\n".join(rows)


def _right_table(log: Path) -> str:
    """The last running mean of every side of a window."""
    last: dict[int, float] = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        last |= {int(k[6:]): v for k, v in record.items() if k.startswith("right_")}
    rows = ["| patches, high and wide | right |", "| ---: | ---: |"]
    return "\n".join([*rows, *(f"| {side} | {value:.1%} |" for side, value in last.items())])


def card(model: Path, log: Path, command: str, notes: str) -> str:
    """The text of the card."""
    e = json.loads((model / "evaluation.json").read_text())
    pipe = VisionPipeline.from_pretrained(model)
    vit, args = pipe.model, pipe.config.model_args
    rows, columns = vit.patch_embed.grid_size
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    files = " and ".join(f"{len(numbers)} in `{name}`" for name, numbers in FILES.items())
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    low, high = (f"{side:g}" for side in CROP_SIZES)
    return f"""{FRONT}
# vit-digits

A small trained ViT that names the one handwritten digit of a small cluttered canvas. Most of its
patches show something else, so that attention between tokens can be thinned out, and tokens merged
or left out, with an effect that can be measured. It exists for that, on a real timm
`VisionTransformer` on two CPU cores; it is of no other use.

![crops over what was found in them](samples.png)

```python
import accel
from accel.pipelines.vision import VisionPipeline

pipe = VisionPipeline.from_pretrained("samples/models/vit-digits")
digit = pipe.classes[int(pipe("samples/models/vit-digits/test/000.png").labels[0])]
accel.enable(pipe, plan)
```

The folder is also timm's: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

## Data

The 8x8 scans of the UCI optical digits (Alpaydin and Kaynak, 1998) that ship with scikit-learn, one
on a canvas of {CROP} x {CROP} pixels, {low} to {high} pixels high, turned, sheared and stretched,
among rulings, stains, strokes and scribbles. Every fifth scan is held out.
`samples/digit_crops.py` makes crop `(seed, index)`.

Committed crops of held-out scans: {files}; `labels.json` names their digits.

## Architecture

{parameters_of(vit) / 1e6:.2f} M parameters, {size:.1f} MiB in float16. {args["depth"]} blocks of
width {args["embed_dim"]}, {args["num_heads"]} heads, hidden layers {args["mlp_ratio"]:g} times as
wide, patches of {args["patch_size"]} pixels: {rows} x {columns} of them, one class token and
{args["reg_tokens"]} registers.

## Training

    {command}

{e["device"]}, no accelerator, {date.today():%Y-%m-%d}; {used}.
Muon for matrices, AdamW for the rest, moving averages of the weights. Windows of patches around the
digit come first, whole crops at the end; a head that is thrown away reads from the patches which
digit covers them (see `samples/vit_digits_training.py`).

{stages_table(log)}

Running means of the training crops at the end of each size of window:

{_right_table(log)}

{notes}
## Evaluation

    python samples/evaluate_vit_digits.py --crops {e["crops"]}

Dense, {e["crops"]} other crops of held-out scans. Top-1: **{e["top1"]:.1%}**; of the
{e["test_files"]["images"]} crops in `test` {e["test_files"]["top1"]:.1%}. One crop takes
{e["seconds"]} s.

{_digits_table(e)}

## Limits

It knows ten digits, one size of canvas and one kind of clutter.

## Licence

Apache-2.0 for weights and code. Digits: Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository (CC BY 4.0), through scikit-learn.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "vit-digits")
    parser.add_argument("--log", type=Path, default=HERE / ".work" / "vit-digits" / "log.jsonl")
    parser.add_argument("--command", required=True, help="the command that trained the weights")
    parser.add_argument(
        "--notes", default="", help="a paragraph on what differed from the command above"
    )
    options = parser.parse_args()
    (options.model / "README.md").write_text(
        card(options.model, options.log, options.command, options.notes)
    )
