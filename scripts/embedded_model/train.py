"""Trains the embedded model: a small OLMoE on the six domains, within a wall-clock budget.

Each sequence holds text of one domain, so that a router can find something to specialise in.
The learning rate warms up, stays, then falls to zero over the last part of the budget (whichever of
`--minutes` and `--tokens` runs out first), so that a run cut to any length ends annealed. The last
steps use longer sequences, which teaches positions past the short ones at little cost.
Checkpoints are safetensors; progress goes to `log.jsonl` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import CACHE, DOMAINS
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True)
class Plan:
    """What one run does; written to the log's first line."""

    minutes: float
    tokens: int
    peak: float
    batch_tokens: int
    length: int
    long_length: int
    long_share: float
    warmup_tokens: int
    decay_share: float
    precision: str
    balance: float
    experts: str
    seed: int


def new_config() -> OlmoeConfig:
    """The shape of the embedded model: 8 layers of 32 experts, 4 active, 15.3 M parameters."""
    return OlmoeConfig(
        vocab_size=4096,
        hidden_size=160,
        intermediate_size=112,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def encode_domains(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Tokens]]:
    """Every training document as token ids with its end mark, by domain."""
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    with path.open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            texts[document["domain"]].append(document["text"])
    end = [tokenizer.eos_token_id]
    return {
        domain: [np.asarray(ids + end, np.int32) for ids in tokenizer(found)["input_ids"]]
        for domain, found in texts.items()
    }


def sequences(documents: list[Tokens], length: int, seed: int) -> Iterator[Tokens]:
    """Endless sequences of one domain: documents shuffled and packed anew every epoch."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(documents))
        stream = np.concatenate([documents[i] for i in order])
        stream = np.roll(stream, -int(random.integers(length)))
        count = len(stream) // length
        yield from stream[: count * length].reshape(count, length)[random.permutation(count)]


def batches(
    documents: dict[str, list[Tokens]], rows: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Batches with equal shares of the domains over time, in a shuffled order."""
    random = np.random.default_rng(seed)
    streams = {
        domain: sequences(found, length, seed + 1 + number)
        for number, (domain, found) in enumerate(documents.items())
    }
    turn: list[str] = []
    while True:
        chosen = []
        for _ in range(rows):
            if not turn:
                turn = [str(domain) for domain in random.permutation(list(streams))]
            chosen.append(next(streams[turn.pop()]))
        yield torch.from_numpy(np.stack(chosen)).long()


def learning_rate(plan: Plan, tokens: int, progress: float) -> float:
    """Warm-up by tokens, a plateau, then a straight fall to zero at the end of the budget."""
    warm = min(1.0, (tokens + plan.batch_tokens) / plan.warmup_tokens)
    fall = min(1.0, max(0.0, 1.0 - progress) / plan.decay_share)
    return plan.peak * warm * fall


def new_optimizer(model: OlmoeForCausalLM, peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms and the embedding are left alone."""
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def balance_loss(logits: tuple[torch.Tensor, ...], top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How unevenly each layer loads its experts (1 is even), and the busiest expert over the mean.

    The library's own loss adds the layers up before it compares experts, so one layer's overload
    cancels another's idleness and every layer may collapse onto a few experts. This one compares
    within each layer. All domains share a batch, so experts may still specialise in one of them.
    """
    stacked = torch.stack([layer.float() for layer in logits])
    count = stacked.shape[-1]
    picks = stacked.topk(top).indices.flatten(1)
    used = torch.zeros(len(stacked), count).scatter_add_(1, picks, torch.ones_like(picks).float())
    share = used / picks.shape[1]
    return (share * stacked.softmax(-1).mean(1)).sum(1) * count, share.max() * count


def step(
    model: OlmoeForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor, plan: Plan
) -> tuple[float, float, float]:
    """One update; returns the language loss, the balance loss and the busiest expert's load."""
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
        hidden = model.model(input_ids=batch, output_router_logits=True, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[:, :-1]).flatten(0, 1)
    language = torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
    balance, busiest = balance_loss(hidden.router_logits, model.config.num_experts_per_tok)
    (language + plan.balance * balance.mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(language.detach()), float(balance.detach().mean()), float(busiest)


def free_threads(most: int) -> int:
    """Threads worth using now: those beyond other programs' running ones, where Linux tells.

    A parallel section waits for its slowest thread, so on a shared machine at low priority two
    threads, one of them starved, are many times slower than one.
    """
    counts = Path("/proc/loadavg")
    if not counts.exists():
        return most
    running = int(counts.read_text(encoding="utf-8").split()[3].partition("/")[0])
    return min(most, max(1, most + 1 - running))


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the weights in bf16, as shipped, and leaves the model in training in float32."""
    half = OlmoeForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    model: OlmoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: dict[str, list[Tokens]],
    plan: Plan,
    out: Path,
) -> None:
    """The training loop; ends when the time or the tokens of the plan are spent."""
    optimizer = new_optimizer(model, plan.peak)
    rows, long_rows = plan.batch_tokens // plan.length, plan.batch_tokens // plan.long_length
    short = batches(documents, rows, plan.length, plan.seed)
    long = batches(documents, long_rows, plan.long_length, plan.seed + 100)
    begin = saved = time.monotonic()
    threads = torch.get_num_threads()
    tokens, number, progress = 0, 0, 0.0
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"plan": asdict(plan), "torch": torch.__version__}) + "\n")
        while progress < 1.0:
            rate = learning_rate(plan, tokens, progress)
            for settings in optimizer.param_groups:
                settings["lr"] = rate
            torch.set_num_threads(free_threads(threads))
            batch = next(long if progress > 1.0 - plan.long_share else short)
            loss, balance, busiest = step(model, optimizer, batch, plan)
            tokens, number = tokens + batch.numel(), number + 1
            now = time.monotonic()
            progress = max((now - begin) / 60 / plan.minutes, tokens / plan.tokens)
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {number}")
            if number % 10 == 0 or progress >= 1.0:
                row = {
                    "step": number,
                    "tokens": tokens,
                    "seconds": round(now - begin, 1),
                    "loss": round(loss, 4),
                    "balance": round(balance, 4),
                    "busiest": round(busiest, 2),
                    "rate": round(rate, 7),
                    "length": batch.shape[1],
                    "threads": torch.get_num_threads(),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
            if now - saved > 300:
                save(model, tokenizer, out / "checkpoint")
                saved = now
    save(model, tokenizer, out / "final")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--long-length", type=int, default=1024)
    parser.add_argument("--long-share", type=float, default=0.12)
    parser.add_argument("--warmup-tokens", type=int, default=400_000)
    parser.add_argument("--decay-share", type=float, default=0.5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--balance", type=float, default=0.04)
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    cache, folder, out = (arguments.pop(name) for name in ("cache", "tokenizer", "out"))
    plan = Plan(**arguments)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    model = OlmoeForCausalLM(new_config()).float()
    model.set_experts_implementation(plan.experts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = encode_domains(cache / "text" / "train.jsonl", tokenizer)
    counts = {domain: sum(map(len, found)) for domain, found in documents.items()}
    print("training tokens by domain:", counts, flush=True)
    train(model, tokenizer, documents, plan, out)


if __name__ == "__main__":
    main()
