"""Dynamic Expert Sharing on the embedded model: what it saves, what it costs in quality, and how far replay is off.

1. Windows of held-out text (tracer/embedded/heldout.jsonl), fed token by token: a batch of n windows makes passes of n
   tokens, the blocks that share experts. The tokens are given, so every setting reads the same text.
2. Trace the resident model with the gates' scores of all experts; replay the trace under every setting.
3. Run every setting for real at 25 % of the experts behind an emulated link: distinct experts, loss of the given
   tokens, tokens/s. Predictions come from costs calibrated just before on other windows.

Exits 1 if a bar is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import ROOT, Report, Table, options_of, parser, write_block
from expertflow.runtime.calibrate import Calibration
from expertflow.runtime.machine import Machine
from expertflow.simulator.forecast import Forecaster, forecaster
from expertflow.simulator.policy.spec import PolicySpec, make_spec
from expertflow.simulator.result import Result
from expertflow.simulator.workload import Workload
from expertflow.tracer import embedded
from expertflow.tracer.console import progress
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import LoadedModel, choose_device, load_model
from expertflow.tracer.placement import use_threads
from expertflow.tracer.prompts import MAX_PROMPT_TOKENS, read_prompts, teacher_forced
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run

SCRIPT = "des.py"
PAGE = ROOT / "docs" / "des.md"
LINK = "1GB/s+20us"
BUDGET = 0.25
WINDOW = 48
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as_routed", {}),
    ("des_seq", {"k": 3}),
    ("des_seq", {"k": 2}),
    ("des_seq", {"k": 1}),
    ("des_vote", {"beta": 0.6}),
    ("des_vote", {"beta": 0.4}),
    ("des_vote", {"beta": 0.3}),
    ("des_vote", {"beta": 0.2}),
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    windows: int
    blocks: tuple[int, ...]
    repeats: int


FULL = Size(64, (4, 16, 32), 3)
QUICK = Size(4, (4,), 1)


@dataclass
class Setting:
    """One routing at one size of block: predictions and what was measured."""

    spec: PolicySpec
    predicted: Result
    restricted: Result
    measured: list[Result] = field(default_factory=list)
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Negative log-likelihood of the given tokens, in nats: [windows, tokens]."""


def main() -> None:
    """Trace, replay, run, and say what was found."""
    options = options_of(parser(__doc__))
    size = QUICK if options.quick else FULL
    report = Report(SCRIPT, options)
    device = choose_device("cpu")
    use_threads(1, device)
    loaded = load_model(None, device=device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judged, spare = windows(folder, loaded, size.windows, max(size.blocks))
        traces = {block: traced(folder, judged, block) for block in size.blocks}
        prompts, others = (
            teacher_forced(loaded.tokenizer, read_prompts(path), MAX_PROMPT_TOKENS, WINDOW - 1)
            for path in (judged, spare)
        )
        machine = Machine(loaded, device, link=LinkSpec.parse(LINK))
        for block in size.blocks:
            ready = calibrated(machine, traces[block], others, block)
            settings = [setting(ready, *each) for each in SETTINGS]
            run(machine, settings, prompts, block, size.repeats)
            show(report, block, settings)
        machine.close()
    if options.write:
        write_block(PAGE, SCRIPT, report.text())
    options.write = False  # the other page is not ours
    report.finish()


def windows(folder: Path, loaded: LoadedModel, count: int, spare: int) -> tuple[Path, Path]:
    """Texts of exactly WINDOW tokens, domains in turn: those to judge on, and others to calibrate on."""
    by_domain: dict[str, list[dict[str, str]]] = {}
    for number, line in enumerate(
        (embedded.MODEL_DIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        row = json.loads(line)
        ids = loaded.tokenizer(row["text"])["input_ids"]
        found = by_domain.setdefault(row["domain"], [])
        for first in range(0, len(ids) - WINDOW, 4 * WINDOW):
            text = loaded.tokenizer.decode(ids[first : first + WINDOW])
            if len(loaded.tokenizer(text)["input_ids"]) == WINDOW:
                found.append({"id": f"{number}-{first}", "domain": row["domain"], "text": text})
    turns = [
        rows[place] for place in range(10_000) for rows in by_domain.values() if place < len(rows)
    ]
    paths = folder / "judged.jsonl", folder / "spare.jsonl"
    for path, rows in zip(paths, (turns[:count], turns[count : count + spare]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def traced(folder: Path, prompts: Path, block: int) -> Trace:
    """The resident model fed the windows, every pass one token of each of `block` windows."""
    request = TraceRequest(
        out=folder / f"trace-{block}",
        prompts=prompts,
        max_new_tokens=WINDOW - 1,
        batch_size=block,
        teacher_forced=True,
        residency="resident",
        device="cpu",
        threads=1,
        scores=32,
    )
    trace_run(request, progress=progress, say=hint)
    return Trace.open(request.out)


def calibrated(machine: Machine, trace: Trace, others: Sequence[Prompt], block: int) -> Forecaster:
    """Predictions for the trace's passes on this machine, measured now on other windows."""
    costs = Calibration(machine, others, batch_size=block, max_new_tokens=WINDOW - 1).measure(
        lambda _: None
    )
    return replace(
        forecaster(trace),
        costs=costs,
        decision_is_measured=True,
        link=LINK,
        link_origin="emulated",
    )


def setting(ready: Forecaster, routing: str, params: dict[str, Any]) -> Setting:
    """One routing under LRU in equal shares, predicted with all scores, and with the recorded top-k alone."""
    spec = make_spec(
        slots=round(BUDGET * ready.shape.total_experts), routing=routing, routing_params=params
    )
    bare = replace(ready, workload=without_scores(ready.workload))
    return Setting(
        spec,
        ready.predict(spec, with_bounds=False),
        bare.predict(spec, with_bounds=False),
    )


def without_scores(workload: Workload) -> Workload:
    """The same trace as if --scores had been left out."""
    return replace(workload, rows=replace(workload.rows, scores=None, score_ids=None))


def run(
    machine: Machine,
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    block: int,
    repeats: int,
) -> None:
    """Run all settings in turns; the losses are those of the last turn."""
    passes = -(-len(prompts) // block) * (WINDOW - 1)
    for turn in range(repeats):
        for one in settings:
            hint(f"block {block}, turn {turn + 1} of {repeats}: {one.spec.routing}")
            with heard(machine) as logits:
                record, _ = machine.run(
                    one.spec,
                    prompts,
                    batch_size=block,
                    max_new_tokens=WINDOW - 1,
                    memory=one.measured[0].memory if one.measured else None,
                )
            one.measured.append(machine.result(record, one.spec, batch_size=block))
            one.loss = losses(logits[-passes:], prompts, block)


@contextmanager
def heard(machine: Machine) -> Iterator[list[torch.Tensor]]:
    """Keeps what the model says of the next token in every pass: [batch, vocabulary] each."""
    said: list[torch.Tensor] = []
    handle = machine.loaded.model.register_forward_hook(
        lambda module, args, output: said.append(output.logits[:, -1])
    )
    try:
        yield said
    finally:
        handle.remove()


def losses(logits: Sequence[torch.Tensor], prompts: Sequence[Prompt], block: int) -> np.ndarray:
    """Loss of every given token: [windows, tokens]."""
    found: list[np.ndarray] = []
    for first in range(0, len(prompts), block):
        batch = prompts[first : first + block]
        begin = first // block * (WINDOW - 1)
        said = torch.stack(list(logits[begin : begin + WINDOW - 1]), dim=1).float()
        given = torch.tensor([prompt.forced for prompt in batch])
        lost = -said.log_softmax(dim=-1).gather(2, given[:, :, None])[:, :, 0]
        found.append(lost.numpy())
    return np.concatenate(found)


def show(report: Report, block: int, settings: Sequence[Setting]) -> None:
    """Tables of one size of block, and the bars that hold for it."""
    plain = settings[0]
    report.table(
        Table(
            f"Blocks of {block} tokens: distinct experts per layer and pass, and loss of the given tokens "
            f"({plain.loss.size:,} tokens, {len(plain.loss)} windows)",
            (
                "routing", "distinct, measured", "simulated", "simulated, top-4 only", "choices changed, measured",
                "simulated", "loss, nats", "Δ loss ± s.e.", "perplexity",
            ),
            [quality(one, plain) for one in settings],
        )
    )  # fmt: skip
    report.table(
        Table(
            f"Blocks of {block} tokens, {BUDGET:.0%} of the experts, LRU in equal shares, link emulated at {LINK}: "
            f"medians of {len(plain.measured)} runs",
            (
                "routing", "tokens/s predicted", "measured", "hits predicted", "measured",
                "MB/token predicted", "measured", "decision measured, ms/pass",
            ),
            [speed(one) for one in settings],
        )
    )  # fmt: skip
    gap = abs(distinct(plain.predicted) - distinct(plain.measured[-1]))
    report.bar(
        f"block {block}, as routed: simulated and measured distinct experts differ by",
        gap, 0.01, "", at_least=False, always=True,
    )  # fmt: skip
    replays = all(run.log_replays for one in settings for run in one.measured)
    report.bar(
        f"block {block}: decision logs that replay",
        float(replays),
        1,
        "",
        at_least=True,
        always=True,
    )
    report.numbers(
        f"block_{block}",
        {
            str(one.spec.routing): {
                "loss": float(one.loss.mean()),
                "distinct_measured": distinct(one.measured[-1]),
                "distinct_simulated": distinct(one.predicted),
                "tokens_per_s_predicted": one.predicted.tokens_per_s,
                "tokens_per_s_measured": [run.tokens_per_s for run in one.measured],
            }
            for one in settings
        },
    )


def distinct(result: Result) -> float:
    """Distinct experts per event over all passes."""
    phases = (result.prefill, result.decode)
    steps = sum(phase.steps for phase in phases)
    return sum(phase.mean_distinct * phase.steps for phase in phases) / steps


def quality(one: Setting, plain: Setting) -> tuple[str, ...]:
    """One line of the first table. The error is of the mean over windows, setting and baseline paired."""
    apart = (one.loss - plain.loss).mean(axis=1)
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else 0.0
    measured, simulated = one.measured[-1].routing, one.predicted.routing
    return (
        str(one.spec.routing),
        f"{distinct(one.measured[-1]):.1f}",
        f"{distinct(one.predicted):.1f}",
        f"{distinct(one.restricted):.1f}",
        f"{measured.changed_share:.1%}" if measured else "–",
        f"{simulated.changed_share:.1%}" if simulated else "–",
        f"{one.loss.mean():.3f}",
        f"{apart.mean():+.3f} ± {error:.3f}" if one is not plain else "–",
        f"{np.exp(one.loss.mean()):.1f}",
    )


def speed(one: Setting) -> tuple[str, ...]:
    """One line of the second table."""
    middle = statistics.median(run.tokens_per_s for run in one.measured)
    last, predicted = one.measured[-1], one.predicted
    passes = last.prefill.steps + last.decode.steps
    return (
        str(one.spec.routing),
        f"{predicted.tokens_per_s:.0f}",
        f"{middle:.0f}",
        f"{predicted.hit_rate:.1%}",
        f"{last.hit_rate:.1%}",
        f"{predicted.bytes_per_token / 1e6:.2f}",
        f"{last.bytes_per_token / 1e6:.2f}",
        f"{1e3 * last.time.decision_s / passes:.1f}",
    )


def hint(words: str) -> None:
    """Say on stderr what goes on."""
    print(words, file=sys.stderr)


if __name__ == "__main__":
    main()
