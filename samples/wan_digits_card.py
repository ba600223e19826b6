"""Write the model card of wan-digits from the files of its training and evaluation.

python samples/wan_digits_card.py --command "python samples/train_wan_digits.py --minutes 85"
"""

import argparse
import json
from pathlib import Path

from diffusers import WanPipeline
from training import parameters_of, stages_table

HERE = Path(__file__).parent
FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
"""


def _recalls(table: list[list[list]]) -> str:
    """Layers down, heads across; each entry the recall and the order that gives it."""
    heads = range(len(table[0]))
    head_row = "| layer | " + " | ".join(f"head {h}" for h in heads) + " |"
    rows = [
        f"| blocks.{i}.attn1 | " + " | ".join(f"{v:.2f} ({o})" for v, o in layer) + " |"
        for i, layer in enumerate(table)
    ]
    return "\n".join([head_row, "| --- " * (len(table[0]) + 1) + "|", *rows])


def _rates(rates: dict[str, float]) -> str:
    """Shares of right digits and motions for one digit, two digits and all videos."""
    rows = ["| videos | number | digits right | motion right |", "| --- | --- | --- | --- |"]
    for name in ("one", "two", "all"):
        if f"{name}_videos" in rates:
            digits, motion = rates[f"{name}_digits_right"], rates[f"{name}_motion_right"]
            rows.append(f"| {name} | {rates[f'{name}_videos']} | {digits:.1%} | {motion:.1%} |")
    return "\n".join(rows)


def card(model: Path, log: Path, command: str, notes: str) -> str:
    """The text of the card."""
    e = json.loads((model / "evaluation.json").read_text())
    pipe = WanPipeline.from_pretrained(model)
    counts = {n: parameters_of(getattr(pipe, n)) for n in ("transformer", "vae", "text_encoder")}
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    r = e["rates"]
    share = f"{e['vae_and_text_share_of_run']:.1%}"
    scales = " ".join(e["guidance_trials"]) or f"{e['guidance']:g}"
    tried = ", ".join(f"{scale}: {value:.2f}" for scale, value in e["guidance_trials"].items())
    trials = (
        f"\nGuidance was chosen on ten other videos (digits twice, motion once): {tried}.\n"
        if tried
        else ""
    )
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    return f"""{FRONT}
# wan-digits

A small trained text-to-video pipeline of the Wan architecture: handwritten digits that move over
drifting textures. It exists so that sparse attention can be searched, tested and shown on a real
diffusers `WanPipeline` on two CPU cores; it is of no other use.

![samples](samples.png)

```python
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("samples/models/wan-digits")
video = pipe(
    "a seven moving left",
    height=64,
    width=64,
    num_frames=33,
    num_inference_steps={e["steps"]},
    guidance_scale={e["guidance"]:.1f},
    max_sequence_length=64,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
).frames[0]
```

Prompts: `a|an <zero … nine> moving left|right|up|down` or `standing still`, and two of these joined
by `and`, the left or upper digit first.

## Data

The 8x8 scans of the UCI optical digits (Alpaydin and Kaynak, 1998) that ship with scikit-learn,
enlarged to 23 to 30 pixels, slightly sheared, moving at 0.65 to 1 pixel per frame on 64x64 pixels,
33 frames, one digit or two (`--two` of the training script). Backgrounds are band-limited coloured
noise that drifts at a constant velocity, new for every video. Every fifth scan is held out.
`samples/moving_digits.py` makes video `(seed, index)`.

## Architecture

{parts}; {size:.1f} MiB, the autoencoder in float16 and the rest in float32.
`WanTransformer3DModel`: 4 blocks, 4 heads of 48, feed-forward 448, patches of one latent cell, RMS-
normalised queries and keys. `AutoencoderKLWan`: 4x in space (pixels folded 2x2, then one stride),
2x in time, 8 channels. 33 frames of 64x64 become 17 x 16 x 16 = 4352 tokens. `UMT5EncoderModel`: 2
layers of width 64, 23 words. Scheduler {e["scheduler"]}, flow
shift {pipe.scheduler.config.get("flow_shift", 1.0):g}.

## Training

    {command}
    python samples/train_digit_classifier.py --seed 0

{e["device"]}, float32, no accelerator. Muon for matrices, AdamW for the rest; a head that is thrown
away reads from the third block which digit's square covers each cell (see
`samples/wan_digits_denoiser.py`).

{stages_table(log)}

{notes}
## Evaluation

    python samples/evaluate_wan_digits.py --videos {r["all_videos"]} --guidance {scales}

Dense runs, {e["steps"]} steps, guidance {e["guidance"]:g}.
A video counts as right if the classifier in
`samples/models/digit-classifier`, trained apart and never used in training this model, ranks
exactly the prompted digits first (mean of the frame logits). Motion counts as right if the centre
of the bright pixels moves within 45 degrees of the prompted direction (of the sum of the two
directions, where there are two).

{_rates(r)}

Autoencoder: {e["vae_psnr_db"]} dB PSNR on held-out videos.
One dense forward takes {e["forward_seconds"]} s, decoding {e["decode_seconds"]} s, text
{e["text_seconds"]} s: {share} of a 30-step run with guidance lie outside the denoiser.
{trials}
### Recall at keep 0.25

Share of softmax mass inside the best quarter of the 64x64 key blocks of each query-block row, for
the best of the six axis orders and a 4x4x4 tile order (`samples/attention_recall.py`). Uniform
attention would give 0.25.

Middle step of a generation, both branches (mean {e["recall_generated_mean"]:.2f}):

{_recalls(e["recall_generated"])}

Real held-out video noised to 0.8 and 0.6 (mean {e["recall_real_mean"]:.2f}):

{_recalls(e["recall_real"])}

## Limits

It knows 23 words, ten digits and one kind of background. Other sizes and lengths run but were not
trained. Two digits are harder than one: where their motions differ there is often a third shape.

## Licence

Apache-2.0 for weights and code. Digits: Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository (CC BY 4.0), through scikit-learn.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "wan-digits")
    parser.add_argument("--log", type=Path, default=HERE / ".work" / "wan-digits" / "log.jsonl")
    parser.add_argument("--command", required=True, help="the command that trained the weights")
    parser.add_argument(
        "--notes", default="", help="a paragraph on what differed from the command above"
    )
    options = parser.parse_args()
    (options.model / "README.md").write_text(
        card(options.model, options.log, options.command, options.notes)
    )
