"""Write the model card of flux-digits from the files of its training and evaluation.

python samples/flux_digits_card.py --command "python samples/train_flux_digits.py --minutes 62"
"""

import argparse
import json
from datetime import date
from pathlib import Path

from diffusers import FluxPipeline
from training import parameters_of, stages_table

from accel.pipelines.provenance import versions

HERE = Path(__file__).parent
FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
"""


def _losses(log: Path) -> str:
    """The last running mean of every loss that the denoiser's stage wrote, by windows."""
    last = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["stage"] == "denoiser":
            last |= {k: v for k, v in record.items() if k.startswith(("loss_", "meaning_"))}
    rows = ["| windows x side (tokens) | squared error | meaning |", "| --- | --- | --- |"]
    for name in sorted(k[5:] for k in last if k.startswith("loss_")):
        rows.append(f"| {name} | {last[f'loss_{name}']:.3f} | {last[f'meaning_{name}']:.3f} |")
    return "\n".join(rows)


def card(model: Path, log: Path, command: str, notes: str) -> str:
    """The text of the card."""
    e = json.loads((model / "evaluation.json").read_text())
    pipe = FluxPipeline.from_pretrained(model)
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    parts = ", ".join(f"{n} {parameters_of(getattr(pipe, n)) / 1e6:.2f} M" for n in names)
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    r, real = e["rates"], e["real_rates"]
    share = f"{e['vae_and_text_share_of_run']:.1%}"
    scales = " ".join(e["guidance_trials"]) or f"{e['guidance']:g}"
    tried = ", ".join(f"{scale}: {value:.2f}" for scale, value in e["guidance_trials"].items())
    command_again = f"--images {r['images']} --guidance {scales} --steps {e['steps']}"
    trials = f"\nGuidance was chosen on eight other prompts (digits right): {tried}.\n"
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""{FRONT}
# flux-digits

A small trained text-to-image pipeline of the Flux architecture: handwritten digits at named places
of a 256 x 256 canvas. It exists so that sparse attention can be searched, tested and shown on a
real diffusers `FluxPipeline`, with joint attention of text and 4,096 image tokens, on two CPU
cores; it is of no other use.

![samples](samples.png)

```python
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("samples/models/flux-digits")
image = pipe(
    "a seven top left and a three bottom right",
    height=256,
    width=256,
    num_inference_steps={e["steps"]},
    true_cfg_scale={e["guidance"]:.1f},
    negative_prompt="",
    max_sequence_length=32,
    generator=torch.Generator().manual_seed(0),
).images[0]
```

Prompts: one to four of `a|an <zero … nine> <place>` joined by `and`, in reading order; the places
are `top left`, `top`, `top right`, `left`, `center`, `right`, `bottom left`, `bottom` and
`bottom right`. `max_sequence_length` must be 32: the pipeline gives its T5 encoder no mask, so
padding is part of what was trained.

## Data

The 8x8 scans of the UCI optical digits (Alpaydin and Kaynak, 1998) that ship with scikit-learn,
enlarged to 36 to 42 pixels, slightly sheared, up to 5 pixels off the centres of a 3 x 3 raster.
Grounds are band-limited coloured noise. All digits of an image have one colour, and its ground has
one hue, so that far ends of the canvas depend on each other. Every fifth scan is held out.
`samples/placed_digits.py` makes image `(seed, index)`.

## Architecture

{parts}; {size:.1f} MiB, autoencoder and transformer in float16 and the text encoders in float32.
`FluxTransformer2DModel`: 2 double and 3 single blocks, 4 heads of 48, rotary axes (8, 20, 20).
`AutoencoderKL`: 2x in space, 3 channels, which are close to the mean colours of 2 x 2 pixels.
Packed 2 x 2, an image of 256 x 256 pixels is 64 x 64 = 4096 tokens, beside 32 of text.
`T5EncoderModel`: 2 layers of width 64; `CLIPTextModel`: one layer of width 64 for the pooled
vector. Scheduler {e["scheduler"]}, shift {pipe.scheduler.config.shift:g}.

## Training

    {command}

{e["device"]}, no accelerator, {date.today():%Y-%m-%d}; {used}. Muon for matrices, AdamW for the
rest; a head that is thrown away reads from the third block which digit's square covers each token.
Most steps see windows of the canvas that keep their places, the last ones whole canvases (see
`samples/flux_digits_denoiser.py`).

{stages_table(log)}

Running means at the end of the stage, over all noise levels; `meaning` is the loss of the head:

{_losses(log)}

{notes}
## Evaluation

    python samples/evaluate_flux_digits.py {command_again}

Dense runs, {e["steps"]} steps, guidance {e["guidance"]:g}, random prompts of two to four digits. A
digit counts as right if the classifier in `samples/models/digit-classifier`, trained apart on the
videos of wan-digits and never used in training this model, ranks it first in the 80 x 80 pixels
around its place. A place that was left empty counts as right if the classifier finds no digit
likelier than not. Real images are `samples/placed_digits.py` with held-out scans: the most that
this judge gives.

| | generated | real |
| --- | --- | --- |
| images | {r["images"]} | {real["images"]} |
| digits asked for | {r["digits"]} | {real["digits"]} |
| digits right | {r["digits_right"]:.1%} | {real["digits_right"]:.1%} |
| images with all digits right | {r["images_all_right"]:.1%} | {real["images_all_right"]:.1%} |
| empty places right | {r["empty_places_right"]:.1%} | {real["empty_places_right"]:.1%} |

Autoencoder: {e["vae_psnr_db"]} dB PSNR on held-out images.
One dense forward takes {e["forward_seconds"]} s, decoding {e["decode_seconds"]} s, text
{e["text_seconds"]} s: {share} of a run of {e["steps"]} steps with guidance lie outside the
denoiser.
{trials if tried else ""}
## Limits

It knows 19 words, ten digits, nine places and one kind of ground. Other sizes and text lengths run
but were not trained.

## Licence

Apache-2.0 for weights and code. Digits: Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository (CC BY 4.0), through scikit-learn.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "flux-digits")
    parser.add_argument("--log", type=Path, default=HERE / ".work" / "flux-digits" / "log.jsonl")
    parser.add_argument("--command", required=True, help="the command that trained the weights")
    parser.add_argument(
        "--notes", default="", help="a paragraph on what differed from the command above"
    )
    options = parser.parse_args()
    (options.model / "README.md").write_text(
        card(options.model, options.log, options.command, options.notes)
    )
