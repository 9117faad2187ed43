"""Measures the shipped model: bits per byte, and whether its routing has structure worth caching.

Everything is computed from the bf16 weights as shipped, on the held-out sample beside them, so the
numbers can be redone without the corpus. What is measured, per layer where it applies:

- reuse: the share of a token's experts that the token before also used. Two references stand beside
  it: uniform chance, and what the experts' popularity alone would give without any memory.
- popularity difference: total variation between two domains' shares of expert picks.
- load: the busiest expert against the mean, and how many experts are nearly unused.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW, STRIDE = 1024, 512


@dataclass
class Tally:
    """Sums over one domain's text; picks are counts [layer, expert]."""

    bits: float = 0.0
    bytes: int = 0
    tokens: int = 0
    pairs: int = 0
    shared: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    picks: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def windows(ids: list[int]) -> Iterator[tuple[list[int], int]]:
    """Overlapping windows and how many of their first tokens an earlier window has scored."""
    for begin in range(0, max(1, len(ids) - 1), STRIDE):
        known = 1 if begin == 0 else WINDOW - STRIDE
        window = ids[begin : begin + WINDOW]
        if begin == 0 or len(window) > known:
            yield window, known


def chosen_experts(logits: tuple[torch.Tensor, ...], top: int, count: int) -> torch.Tensor:
    """Which experts each token used, as booleans [layer, token, expert]."""
    stacked = torch.stack([layer.reshape(-1, count) for layer in logits])
    return torch.zeros_like(stacked, dtype=torch.bool).scatter_(-1, stacked.topk(top).indices, True)


@torch.inference_mode()
def score(model: Any, ids: list[int], known: int, tally: Tally) -> None:
    """Adds one window's not yet scored tokens to the tally."""
    batch = torch.tensor([ids])
    out = model(input_ids=batch, output_router_logits=True, use_cache=False)
    losses = torch.nn.functional.cross_entropy(
        out.logits[0, known - 1 : -1].float(), batch[0, known:], reduction="sum"
    )
    config = model.config
    used = chosen_experts(out.router_logits, config.num_experts_per_tok, config.num_experts)
    both = (used[:, known:] & used[:, known - 1 : -1]).sum((1, 2))
    if not tally.pairs:
        tally.shared = torch.zeros(len(used))
        tally.picks = torch.zeros(len(used), config.num_experts)
    tally.bits += float(losses) / math.log(2)
    tally.tokens += len(ids) - known
    tally.pairs += len(ids) - known
    tally.shared += both
    tally.picks += used[:, known:].sum(1)


def measure(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Tally]:
    """One pass over the held-out sample."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for row in rows:
        tally = tallies[row["domain"]]
        tally.bytes += len(row["text"].encode())
        ids = [tokenizer.eos_token_id, *tokenizer(row["text"])["input_ids"]]
        for window, known in windows(ids):
            score(model, window, known, tally)
    return tallies


def rounded(values: Any) -> Any:
    """Numbers with four decimals: more would suggest a precision that is not there."""
    if isinstance(values, torch.Tensor):
        return rounded(values.tolist())
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(float(values), 4)


def language_metrics(tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    """Bits per byte and per token of each domain, and of all together."""
    table = {
        domain: {
            "bits_per_byte": rounded(tally.bits / tally.bytes),
            "bits_per_token": rounded(tally.bits / tally.tokens),
            "bytes": tally.bytes,
            "tokens": tally.tokens,
        }
        for domain, tally in tallies.items()
    }
    total = sum(tally.bytes for tally in tallies.values())
    bits = sum(tally.bits for tally in tallies.values())
    table["all"] = {"bits_per_byte": rounded(bits / total), "bytes": total}
    return table


def reuse_metrics(tallies: dict[str, Tally], top: int) -> dict[str, Any]:
    """Adjacent-token reuse by layer and domain, with both references."""
    measured = {name: tally.shared / tally.pairs / top for name, tally in tallies.items()}
    memoryless = {
        name: ((tally.picks / tally.tokens) ** 2).sum(1) / top for name, tally in tallies.items()
    }
    return {
        "uniform_chance": rounded(top / next(iter(tallies.values())).picks.shape[1]),
        "per_layer": rounded(torch.stack(list(measured.values())).mean(0)),
        "per_layer_from_popularity_alone": rounded(torch.stack(list(memoryless.values())).mean(0)),
        "per_domain": {name: rounded(values.mean()) for name, values in measured.items()},
    }


def popularity_metrics(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Total variation between domains: mean over layers per pair, and per layer over pairs."""
    shares = {name: t.picks / t.picks.sum(1, keepdim=True) for name, t in tallies.items()}
    pairs = {
        f"{a} / {b}": (shares[a] - shares[b]).abs().sum(1) / 2
        for a, b in itertools.combinations(shares, 2)
    }
    return {
        "pairs": {name: rounded(value.mean()) for name, value in pairs.items()},
        "per_layer": rounded(torch.stack(list(pairs.values())).mean(0)),
        "mean": rounded(torch.stack(list(pairs.values())).mean()),
    }


def load_metrics(tallies: dict[str, Tally]) -> dict[str, Any]:
    """How uneven the experts' loads are when all domains weigh the same."""
    shares = [tally.picks / tally.picks.sum(1, keepdim=True) for tally in tallies.values()]
    mean = torch.stack(shares).mean(0)
    relative = mean * mean.shape[1]
    return {
        "busiest_over_mean": rounded(relative.max(1).values),
        "experts_below_a_quarter_of_mean": [int(n) for n in (relative < 0.25).sum(1)],
        "entropy_share": rounded(
            -(mean * mean.clamp_min(1e-12).log()).sum(1) / math.log(mean.shape[1])
        ),
    }


@torch.inference_mode()
def samples(model: Any, tokenizer: Any, prompts: list[dict[str, str]]) -> list[dict[str, str]]:
    """One sampled continuation per domain, from the third prompt of each, at a fixed seed."""
    torch.manual_seed(0)
    out = []
    for row in prompts:
        if not row["id"].endswith("-3"):
            continue
        inputs = tokenizer(row["text"] + "\n", return_tensors="pt")
        settings = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        out.append({"prompt": row["id"], "continuation": text.strip()})
    return out


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((n.partition(":")[2].strip() for n in names if "model name" in n), "unknown")


def environment() -> dict[str, str | int]:
    """What the numbers were computed with."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def training_record(log: Path) -> dict[str, Any]:
    """The plan and the outcome of the training run, from its log."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = rows[-1]
    return {
        **rows[0]["plan"],
        "steps_done": last["step"],
        "tokens_done": last["tokens"],
        "minutes_done": round(last["seconds"] / 60, 1),
        "tokens_per_second": round(last["tokens"] / last["seconds"]),
    }


def corpus_record(folder: Path | None, known: dict[str, Any]) -> dict[str, Any]:
    """Sources and train / held-out overlap: from the corpus, or as an earlier run noted them."""
    names = ("sources", "overlap")
    if folder is None:
        return {name: known.get(name) for name in names}
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names
    }


def model_facts(folder: Path, model: Any) -> dict[str, Any]:
    """Identity and size of the shipped weights."""
    weights = (folder / "model.safetensors").read_bytes()
    return {
        "architecture": model.config.architectures[0],
        "parameters": model.num_parameters(),
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the shipped model")
    parser.add_argument("--log", type=Path, help="log.jsonl of the training run")
    parser.add_argument("--corpus", type=Path, help="folder with sources.json and overlap.json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    folder: Path = arguments.model
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout, prompts = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("heldout.jsonl", "prompts.jsonl")
    )
    target = folder / "metrics.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    begin = time.monotonic()
    tallies = measure(model, tokenizer, heldout)
    metrics = {
        "model": model_facts(folder, model),
        "arithmetic": "float32 arithmetic on the bf16 weights as shipped",
        "command": "python scripts/embedded_model/evaluate.py --model tracer/embedded",
        "environment": environment(),
        "seconds": round(time.monotonic() - begin, 1),
        "training": training_record(arguments.log) if arguments.log else known.get("training"),
        **corpus_record(arguments.corpus, known),
        "language": language_metrics(tallies),
        "reuse": reuse_metrics(tallies, model.config.num_experts_per_tok),
        "popularity_difference": popularity_metrics(tallies),
        "load": load_metrics(tallies),
        "samples": samples(model, tokenizer, prompts),
    }
    text = json.dumps(metrics, indent=1, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
