"""What tracing costs: decode time of the embedded model on the CPU with and without it, in one process.

Prompt by prompt, an untraced and a traced decode of the same tokens follow each other (and take turns in going
first); each pair gives a ratio, and the median over the pairs is judged. A traced decode pays for reading the
routing back and for step times. Rows become Arrow tables thousands at a time and parts every few seconds, which a
median over short decodes would hide: so this is done once for the rows of all pairs, hashes and fsync included,
and its time is charged to every token alike. Wall time and CPU time of the process (all its threads) are both
given: where others use the machine, the wall time of a pair says more of them than of the tracer, and even CPU
time is inflated by the caches they empty. The ratio of the shortest decodes is shown beside the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
from bench_common import Bar, hardware

# The model comes after the path to the packages.
import torch  # isort: skip
from expertflow.tracer import record
from expertflow.tracer.generate import Prompt, StepObserver, StepTokens, greedy
from expertflow.tracer.hooks import installed
from expertflow.tracer.load import LoadedModel, load_model
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.probe import provenance
from expertflow.tracer.prompts import PromptText, choose_prompts, read_prompts, tokenize
from expertflow.tracer.record import Recorder, Recording, ResidentExperts
from expertflow.tracer.timing import StepInfo
from expertflow.tracer.tracing import recorded_names
from expertflow.tracer.types import HardwareProfile, LinkCurve, LinkProfile, RunSettings
from expertflow.tracer.writer import TraceWriter

CPU = torch.device("cpu")
WARM_UPS = 2
BARS = {"ids and weights": (Recording(lookahead=0), 5.0), "and look-ahead": (Recording(), 10.0)}
"""What is recorded, and the most it may add to decode, in percent."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one run's decode."""

    wall_s: float
    cpu_s: float


class _Stopwatch:
    """Times the decode passes of a run, whatever its observer does between them."""

    def __init__(self, inner: StepObserver) -> None:
        self._inner = inner
        self._began = (0.0, 0.0)
        self._is_running = False

    def begin_step(self, info: StepInfo, tokens: StepTokens) -> None:
        if info.phase == "decode" and not self._is_running:
            self.start()
        self._inner.begin_step(info, tokens)

    def end_step(self) -> float:
        return self._inner.end_step()

    def start(self) -> None:
        self._is_running = True
        self._began = (time.perf_counter(), time.process_time())

    def stop(self) -> Spent:
        """Seconds since the first decode pass began."""
        self._is_running = False
        return Spent(time.perf_counter() - self._began[0], time.process_time() - self._began[1])


class _Traced:
    """Decodes with the tracer at work, into one trace."""

    def __init__(
        self, folder: Path, loaded: LoadedModel, recording: Recording, tokens: int
    ) -> None:
        self._loaded, self._tokens = loaded, tokens
        self._writer = _writer(folder / "t", loaded, recording, tokens)
        self._recorder = Recorder(loaded, self._writer, CPU, recording)
        self._steps = 0

    def decode(self, prompt: Prompt) -> Spent:
        """One prompt; its rows become Arrow tables when there are enough of them, as in a run."""
        recorder, watch = self._recorder, _Stopwatch(self._recorder)
        with installed(
            self._loaded.model, self._loaded.layers, lambda la: ResidentExperts(recorder, la)
        ):
            generate(self._loaded, prompt, self._tokens, watch, self._steps)
            spent = watch.stop()
        self._steps += self._tokens
        return spent

    def flush(self) -> Spent:
        """Turn what is left into tables, and write the part that holds everything."""
        watch = _Stopwatch(self._recorder)
        watch.start()
        self._recorder.write()
        self._writer.flush()
        return watch.stop()


def generate(
    loaded: LoadedModel, prompt: Prompt, tokens: int, watch: _Stopwatch, first_step: int
) -> None:
    """Run one prompt, end marks ignored."""
    greedy(
        loaded.model,
        [prompt],
        max_new_tokens=tokens,
        eos_ids=frozenset(),
        pad_id=loaded.pad_id,
        first_step=first_step,
        observer=watch,
    )


def untraced(loaded: LoadedModel, prompt: Prompt, tokens: int) -> Spent:
    """The model as it is."""
    watch = _Stopwatch(SilentObserver())
    generate(loaded, prompt, tokens, watch, 0)
    return watch.stop()


def _writer(out: Path, loaded: LoadedModel, recording: Recording, tokens: int) -> TraceWriter:
    curve = LinkCurve(pinned=False, busy=False, points=((1, 1.0),))
    link = LinkProfile(name="none", origin="declared", curves=(curve,))
    return TraceWriter(
        out,
        shape=loaded.shape,
        hardware=HardwareProfile(
            name="benchmark",
            device="cpu",
            device_bytes=1,
            host_bytes=1,
            threads=1,
            link=link,
            origin="declared",
        ),
        run=RunSettings(
            batch_size=1,
            max_new_tokens=tokens,
            residency="resident",
            experts_implementation=loaded.implementation,
            lookahead=recording.lookahead,
        ),
        provenance=provenance(0, "own-generation"),
        recorded=recorded_names(recording),
    )


def measure(
    loaded: LoadedModel, prompts: Sequence[Prompt], options: argparse.Namespace, what: Recording
) -> dict[str, Any]:
    """Pairs of decodes, and the part at the end."""
    tokens, pairs = options.tokens, []
    # The part is written and charged below.
    record._FLUSH_EVERY_S, record._ROWS_PER_TABLE = float("inf"), sys.maxsize
    with tempfile.TemporaryDirectory() as folder:
        tracer = _Traced(Path(folder), loaded, what, tokens)
        for number in range(options.pairs + WARM_UPS):
            prompt = prompts[number % len(prompts)]
            if number % 2:
                with_it, without = tracer.decode(prompt), untraced(loaded, prompt, tokens)
            else:
                without, with_it = untraced(loaded, prompt, tokens), tracer.decode(prompt)
            if number >= WARM_UPS:
                pairs.append((without, with_it))
            elif number == WARM_UPS - 1:
                tracer.flush()  # the first table imports libraries
        part = tracer.flush()
    found: dict[str, Any] = {"pairs": [[asdict(a), asdict(b)] for a, b in pairs]}
    for kind, name in (("wall", "wall_s"), ("cpu", "cpu_s")):
        before = [getattr(one, name) for one, _ in pairs]
        after = [getattr(one, name) for _, one in pairs]
        written = getattr(part, name) / options.pairs / statistics.median(before)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        found[kind] = {
            "median_percent": 100 * (statistics.median(ratios) - 1 + written),
            "shortest_percent": 100 * (min(after) / min(before) - 1 + written),
            "part_percent": 100 * written,
            "untraced_ms_per_token": 1e3 * statistics.median(before) / (tokens - 1),
        }
    return found


def main() -> None:
    """Measure, print, and end with 1 if a bar is missed."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--pairs", type=int, default=24)
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--json", action="store_true", help="print JSON")
    options = made.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(None, device=CPU)
    texts: list[PromptText] = choose_prompts(read_prompts(None), 12)
    prompts = tokenize(loaded.tokenizer, texts, 256)
    found = {name: measure(loaded, prompts, options, what) for name, (what, _) in BARS.items()}
    bars = [
        Bar(f"{name}, {kind} time", found[name][kind]["median_percent"], limit, False, "%")
        for name, (_, limit) in BARS.items()
        for kind in ("wall", "cpu")
    ]
    if options.json:
        document = {"benchmark": Path(__file__).name, "machine": hardware(), "found": found}
        bars_json = [asdict(bar) | {"is_met": bar.is_met} for bar in bars]
        print(json.dumps({**document, "bars": bars_json}, indent=2))
    else:
        print(f"Measured on {hardware()}; torch {torch.__version__}, 1 thread.")
        for name, kinds in found.items():
            for kind in ("wall", "cpu"):
                told = kinds[kind]
                print(
                    f"{name}, {kind}: {told['median_percent']:+.1f} % (median of {options.pairs} pairs), "
                    f"{told['shortest_percent']:+.1f} % (shortest), of which parts {told['part_percent']:.1f} %; "
                    f"untraced {told['untraced_ms_per_token']:.2f} ms a token"
                )
        for bar in bars:
            print(f"- {bar}")
    sys.exit(0 if all(bar.is_met for bar in bars) else 1)


if __name__ == "__main__":
    main()
