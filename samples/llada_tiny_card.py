"""Write the model card of llada-tiny from the files of its training and evaluation.

python samples/llada_tiny_card.py --command "python samples/train_llada_tiny.py --minutes 60"
"""

import argparse
import json
from datetime import date
from pathlib import Path

from llada_tiny_model import GEN_LENGTH, load
from retrieval_tasks import KINDS
from training import parameters_of, stages_table

from accel.pipelines.provenance import versions

HERE = Path(__file__).parent
FRONT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-generation
---
"""


def _rates_table(rates: dict) -> str:
    rows = [
        "| task | tasks | values right | share | tasks all right |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in (kind for kind in (*KINDS, "all") if kind in rates):
        r = rates[kind]
        rows.append(
            f"| {kind} | {r['tasks']} | {r['right']} of {r['values']} | {r['accuracy']:.1%} |"
            f" {r['tasks_all_right']:.1%} |"
        )
    return "\n".join(rows)


def _lengths_table(log: Path) -> str:
    """The last running mean of every length that the stage trained on."""
    last = {}
    for line in log.read_text().splitlines():
        last |= json.loads(line)
    prompts = sorted({int(k.rsplit("_", 1)[1]) for k in last if k.startswith("recall_")})
    rows = ["| prompt tokens | needle | copy | recall |", "| ---: | ---: | ---: | ---: |"]
    for prompt in prompts:
        shares = (last.get(f"{kind}_{prompt}") for kind in KINDS)
        cells = ("-" if share is None else f"{share:.1%}" for share in shares)
        rows.append(f"| {prompt} | {' | '.join(cells)} |")
    return "\n".join(rows)


def card(model: Path, log: Path, command: str, notes: str) -> str:
    """The text of the card."""
    e = json.loads((model / "evaluation.json").read_text())
    network, _ = load(model)
    c = network.config
    layers, base = f"{c.num_hidden_layers} layers", c.rope_parameters["rope_theta"]
    heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key and value heads"
    size = sum(f.stat().st_size for f in model.rglob("*.safetensors")) / 2**20
    tasks = max((r["tasks"] for kind, r in e["rates"].items() if kind != "all"), default=0)
    windows = next(iter(e["held_out"].values()))["windows"]
    held_out = "\n".join(
        f"| {n} | {h['masked_tokens']} | {h['loss_per_masked_token']:.3f} |"
        f" {h['bound_nats_per_token']:.3f} |"
        for n, h in e["held_out"].items()
    )
    cached = e["cached"]
    cached_tasks = max(r["tasks"] for kind, r in cached["rates"].items() if kind != "all")
    same, both = cached["answers_as_dense"]
    alike = f"; {same} of {both} answers that were also made without are the same" if both else ""
    dense = "Dense answers, of all tokens in every call, were not made of these weights."
    if e["rates"]:
        dense = f"Dense, all tokens in every call:\n\n{_rates_table(e['rates'])}"
    more = f"--cached-tasks {cached_tasks} --windows {windows}" + (
        " --bfloat16" if e["bfloat16"] else ""
    )
    precision = "bfloat16" if e["bfloat16"] else "float32"
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""{FRONT}
# llada-tiny

A small trained masked diffusion language model of LLaDA's kind (arXiv 2502.09992): a transformer
that sees all places and fills masked ones, block by block. It answers questions about texts of
4,096 tokens whose right answers are known, so that sparse attention and token caches can be
searched, tested and shown on long contexts, on two CPU cores; it is of no other use.

```python
import json
from accel.pipelines.dllm import MaskedDiffusionPipeline

pipe = MaskedDiffusionPipeline.from_pretrained("samples/models/llada-tiny")
task = json.loads(open("samples/models/llada-tiny/tasks.jsonl").readline())
out = pipe(task["prompt"], gen_length={GEN_LENGTH}, block_length={e["block"]})
```

A prompt goes through the tokenizer's chat template; {GEN_LENGTH} `<|mask|>` tokens after it are the
answer to be, and `<|eos|>` fills what the answer leaves. `AutoModelForMaskedLM` and `AutoTokenizer`
load `model` and `tokenizer` alone.

## Data

The Python standard library without its tests; about one file in twenty, by a hash of its name, is
held out. Over windows of it `samples/retrieval_tasks.py` lays three kinds of tasks, task
`(seed, index)` always the same:

- `needle`: one to eight lines such as `bake 4821` at random places; up to three are asked for.
- `copy`: one to three marked passages of words, one to be copied, up to 200 tokens.
- `recall`: 16 to 128 such lines, up to 40 of which are asked for in an order of their own.

`tasks.jsonl` has 16 of each kind over held-out text, `tasks-calibration.jsonl` two others. A line
has `id`, `task`, `prompt`, `answer` and `values`: the lines of the answer that count as right.

## Architecture

{parameters_of(network) / 1e6:.2f} M parameters, {size:.1f} MiB in bfloat16. `EuroBertForMaskedLM`,
which transformers loads without code: {layers} of width {c.hidden_size}, {heads} of {c.head_dim},
gated layers of {c.intermediate_size}, RMSNorm, rotary positions of base {base:g}, tied embeddings
of {c.vocab_size} tokens. The tokenizer is a byte-level BPE of the same text; a key is a token, and
so are two digits.

## Training

    {command}

{e["device"]}, no accelerator, {date.today():%Y-%m-%d}; {used}. Muon for matrices, AdamW for the
rest, moving averages of the weights. A share of masked tokens is drawn from (0, 1); in answers,
four times in ten only within one block of {e["block"]} tokens, with all later ones masked, as
decoding sees them, and five times in ten a few holes of one to four tokens. What can be told for
certain from the tokens before it weighs more: one error costs the rest of a long answer. Prompts
grow from 96 to 4,096 tokens; gaps in the positions of short ones let far distances be seen early.
The weights begin as a weak induction circuit, which small models are slow to find: heads of the
first layer copy a neighbour each, later ones match what these copied. Random tokens that come again
and again teach matching at the start (see `samples/llada_tiny_denoiser.py`).

{stages_table(log)}

Running means at the end of each length: tokens of the decoded block that are right in one call,
before most of their neighbours are known:

{_lengths_table(log)}

{notes}

## Evaluation

    python samples/evaluate_llada_tiny.py --tasks {tasks} --steps {e["steps"]} {more}

Prompts of 4,096 tokens and {e["gen_length"]} generated ones in blocks of {e["block"]}, {e["steps"]}
steps, the likeliest places first, {precision}. A value is right if the answer has it as a line.
With a cache of what is outside the block, filled anew for each block, which is many times as
fast{alike}:

{_rates_table(cached["rates"])}

{dense}

Held-out source text, {windows} windows each, masked shares evenly from 0 to 1: mean loss of a
masked token, and the bound of the negative log-likelihood that LLaDA's 1/t weights give.

| window tokens | masked tokens | nats per masked token | bound, nats per token |
| ---: | ---: | ---: | ---: |
{held_out}

## Limits

It knows the three kinds of questions in their one wording, and writes no source text of use.
Prompts of more than 4,096 tokens and answers of more than {GEN_LENGTH} run but were not trained.

## Licence

Apache-2.0 for weights and code. The Python standard library is under the PSF licence.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "models" / "llada-tiny")
    parser.add_argument("--log", type=Path, default=HERE / ".work" / "llada-tiny" / "log.jsonl")
    parser.add_argument("--command", required=True, help="the command that trained the weights")
    parser.add_argument(
        "--notes", default="", help="a paragraph on what differed from the command above"
    )
    options = parser.parse_args()
    (options.model / "README.md").write_text(
        card(options.model, options.log, options.command, options.notes)
    )
