"""Writes the model card from `metrics.json`, so that no number in it is typed by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FRONT = """---
license: apache-2.0
language: [en, fr, es, code]
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe, expert-offloading, demo]
---
"""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """A measured number with a fixed count of decimals."""
    return f"{value:.{digits}f}"


def introduction(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """What it is, its shape and how to load it."""
    model = metrics["model"]
    return f"""# The ExpertFlow embedded model

A very small mixture-of-experts language model, made for this toolkit so that tracing, simulating
and deploying work offline, on any machine, with routing that a trained router really chose. It is
not meant to be useful as a language model.

Stock `{model["architecture"]}` of transformers, no custom code:
{config["num_hidden_layers"]} layers, {config["num_experts"]} experts a layer of which
{config["num_experts_per_tok"]} are active, hidden size {config["hidden_size"]}, expert size
{config["intermediate_size"]}, {config["num_attention_heads"]} attention heads, tied
embeddings, byte-level BPE with {config["vocab_size"]} entries.
{model["parameters"]:,} parameters, {model["bytes"]:,} bytes in bf16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from expertflow.tracer.embedded import MODEL_DIR

tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
```

Beside it: `prompts.jsonl`, 48 held-out prompts (8 a domain, 24 to 200 tokens, none sharing a
start), and `heldout.jsonl`, the held-out sample that the numbers below were measured on."""


def data(metrics: dict[str, Any]) -> str:
    """Sources and their licences."""
    rows = [
        (s["domain"], s["what"], f"`{s['package']}` {s['version']}", s["licence"],
         f"{s['train_bytes']:,}", f"{s['heldout_bytes']:,}")
        for s in metrics["sources"]
    ]  # fmt: skip
    head = (
        "domain",
        "text",
        "Debian package",
        "licence of the text",
        "train bytes",
        "held-out bytes",
    )
    return f"""## Training data

{table(head, rows)}

Documents (chapters, files, pages, runs of theorems) are split into training and held-out text as
wholes; exact repeats are dropped. Markup, proofs, verse marks and credits in the comments are
stripped. Every domain gives the same share of the training tokens."""


def training(metrics: dict[str, Any]) -> str:
    """How long, on what, at which settings."""
    run, machine = metrics["training"], metrics["environment"]
    return f"""## Training

{run["tokens_done"]:,} tokens in {run["steps_done"]:,} steps and {run["minutes_done"]} minutes
({run["tokens_per_second"]:,} tokens a second) on {machine["cores"]} cores of
{machine["processor"]}, in {run["precision"]}, while other work ran on the same cores. AdamW, peak
learning rate {run["peak"]}, {run["batch_tokens"]} tokens a step, a plateau
and then a straight fall to zero over the last {run["decay_share"]:.0%}.
Sequences of {run["length"]} tokens of one domain each, of
{run["long_length"]} in the last {run["long_share"]:.0%}. Load-balancing loss
(within each layer) of weight {run["balance"]}, seed {run["seed"]}.
The run is bounded by time, so a rebuild gives a like model, not the same bytes."""


HEAD = ("domain", "bits per byte", "adjacent-token reuse", "overlap with training text")


def quality(metrics: dict[str, Any]) -> str:
    """Bits per byte, held out."""
    language = metrics["language"]
    rows = [
        (
            name,
            number(row["bits_per_byte"]),
            number(metrics["reuse"]["per_domain"][name]),
            f"{metrics['overlap'][name]:.1%}",
        )
        for name, row in language.items()
        if name != "all"
    ]
    return f"""## Measured on held-out text

In {metrics["arithmetic"]}. `metrics.json` has every number, the versions and the command.
All domains together: {number(language["all"]["bits_per_byte"])} bits per byte.

{table(HEAD, rows)}

Overlap is the share of ten-word runs of the held-out text that are also in the domain's training
text."""


def routing(metrics: dict[str, Any]) -> str:
    """Whether the routing has structure, against what no structure would give."""
    reuse, load = metrics["reuse"], metrics["load"]
    difference = metrics["popularity_difference"]
    columns = zip(
        reuse["per_layer"],
        reuse["per_layer_from_popularity_alone"],
        difference["per_layer"],
        load["busiest_over_mean"],
        load["experts_below_a_quarter_of_mean"],
        strict=True,
    )
    rows = [(i, *(number(v) for v in row[:4]), row[4]) for i, row in enumerate(columns)]
    head = ("layer", "reuse", "from popularity alone", "difference between domains",
            "busiest / mean", "nearly unused")  # fmt: skip
    pairs = sorted(difference["pairs"].items(), key=lambda item: -item[1])
    return f"""Reuse is the share of a token's experts that the token before used too; uniform
chance is {reuse["uniform_chance"]}. The next column is what the experts' popularity within a domain
would give if tokens had no memory. The difference between domains is the total variation
of their expert popularity, mean over pairs; over pairs it runs from
{number(pairs[-1][1])} ({pairs[-1][0]}) to
{number(pairs[0][1])} ({pairs[0][0]}). Nearly unused: experts with under a quarter of the mean load.

{table(head, rows)}"""


def quoted(samples: Sequence[dict[str, str]]) -> str:
    """What it writes: one continuation a domain."""
    blocks = (f"`{s['prompt']}`\n\n```text\n{s['continuation']}\n```" for s in samples)
    return (
        "## Samples\n\nSampled at temperature 0.7, top-p 0.9, one fixed seed, not selected.\n\n"
        + ("\n\n".join(blocks))
    )


LIMITS = """## Limits

- A demonstration model: its text is locally fluent at best and often wrong. Do not use it for
  answers.
- Contexts longer than its longest training sequences are out of its range, though the config
  allows them.
- Its experts are tiny, so times and bytes measured with it say nothing about a large model's; its
  routing is what is real. Domains are narrow (the French is one software manual, the Spanish is
  mostly one old Bible translation), which makes them easier to tell apart than general text.
- Manuals and theorem lists repeat themselves, so held-out text shares phrases with training text.

## Rebuild

`scripts/embedded_model/README.md` in the source repository has the commands. The texts keep their
own licences; the weights, the tokenizer and this card are released under Apache-2.0.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the shipped model")
    folder: Path = parser.parse_args().model
    metrics, config = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "config.json")
    )
    parts = [
        introduction(metrics, config),
        data(metrics),
        training(metrics),
        quality(metrics),
        routing(metrics),
        quoted(metrics["samples"]),
        LIMITS,
    ]
    text = FRONT + "\n" + "\n\n".join(parts)
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
