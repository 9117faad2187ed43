"""Measures what offloading gives on this machine, next to what was predicted and to the usual alternatives.

Cells run in order of importance until the time is up, and finished ones are not run again: start it once more to go
on. Needs torch, transformers, pyarrow and numpy, and runs from the tree. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.command import ROOT, prepare

prepare()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the tree and the stand-ins must be on the path first
from expertflow.runtime.replay.shapes import SHAPES  # noqa: E402
from expertflow.tracer.errors import ExpertFlowError, unknown_name  # noqa: E402
from expertflow.tracer.link import measure_link  # noqa: E402
from expertflow.tracer.load import choose_device  # noqa: E402
from expertflow.tracer.placement import use_threads  # noqa: E402
from expertflow.tracer.probe import machine_name, versions  # noqa: E402
from expertflow.tracer.quantities import LinkSpec  # noqa: E402
from gpu.cells import HALF, KINDS, Cell, cells  # noqa: E402
from gpu.evidence import CellRecord, Evidence  # noqa: E402
from gpu.plain import plain_cell  # noqa: E402
from gpu.settings import EMBEDDED, REPLAYED, Settings, full, quick  # noqa: E402
from gpu.subjects import Subject, subject_of  # noqa: E402
from gpu.summary import write_summary  # noqa: E402
from gpu.trials import Trials  # noqa: E402

_OPENING_S = 30.0
"""Less time than this is not worth drawing a model's weights for."""


def main() -> int:
    """Run what has no evidence yet. Exits 4 without a device, 2 for wrong options, 1 if nothing was measured."""
    options = _options()
    try:
        return run(options)
    except ExpertFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """The whole bench."""
    device = choose_device(options.device)
    if device.type == "cuda" and options.link:
        print("error: --link emulates a bus on the CPU; a GPU has one.", file=sys.stderr)
        return 2
    use_threads(options.threads, device)
    settings = _settings(options)
    out = options.out or _folder(device, options)
    evidence = Evidence(out, settings.fingerprint())
    clock = Clock(options.limit_s)
    about = _about(device, settings, options)
    for place, name in enumerate(settings.subjects):
        share = clock.share(len(settings.subjects) - place)
        try:
            measure(subject_of(name, settings), settings, evidence, share)
        except ExpertFlowError as error:
            say(f"{name}: left out: {error}")
        if evidence.cells:
            write_summary(out, evidence.cells, about)
    if not evidence.cells:
        say("Nothing was measured; give it more time with --limit-s.")
        return 1
    for bar in write_summary(out, evidence.cells, about):
        print(f"{bar.verdict:>12}  {bar.subject}: {bar.name}: {bar.shown} ({bar.goal})")
    print(f"{len(evidence.cells)} cells in {out}")
    return 0


class Clock:
    """Seconds that are left."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end_s = now() + limit_s

    @property
    def left_s(self) -> float:
        """Until the time is up."""
        return self._end_s - self._now()

    def share(self, parts: int) -> Clock:
        """A clock for one of so many equal parts of what is left."""
        return Clock(self.left_s / parts, self._now)


def measure(subject: Subject, settings: Settings, evidence: Evidence, clock: Clock) -> None:
    """All cells of one model that have no evidence yet, while there is time: half of the experts first."""
    known = cells(subject.is_trained, subject.has_lookahead)
    wanted = [
        (batch, cell)
        for is_later in (False, True)
        for batch in settings.batches
        for cell in known
        if is_later == (cell.share not in (HALF, 1.0))
        and not (cell.kind == "accelerate" and batch > 1)
        and cell.kind in (settings.kinds or [cell.kind])
    ]
    missing = [(b, c) for b, c in wanted if not evidence.has(_key(subject, b, c))]
    plain = [(b, c) for b, c in missing if c.is_plain]
    policies = [(b, c) for b, c in missing if not c.is_plain]
    say(
        f"{subject.name}: {len(missing)} of {len(wanted)} cells to measure, {clock.left_s:.0f} s for them"
    )
    if policies and clock.left_s > _opening_s(settings):
        _measure_policies(
            subject, policies, settings, evidence, clock, keep_s=0.2 if plain else 0.0
        )
    for batch, cell in plain:
        if clock.left_s <= 0:
            return
        key = _key(subject, batch, cell)
        try:
            _keep(evidence, plain_cell(subject, cell, batch, settings, key))
        except ExpertFlowError as error:
            say(f"{key}: left out: {error}")


def _measure_policies(
    subject: Subject,
    missing: Sequence[tuple[int, Cell]],
    settings: Settings,
    evidence: Evidence,
    clock: Clock,
    *,
    keep_s: float,
) -> None:
    """Cells that run under a policy. The last share `keep_s` of the time is left to those that do not."""
    reserve_s = keep_s * clock.left_s
    longest_s = 0.0
    trials: dict[int, Trials] = {}
    with subject.open() as opened:
        for batch, cell in missing:
            if clock.left_s - reserve_s <= 1.2 * longest_s:
                say(f"{subject.name}: the time is up; the rest next time")
                return
            if batch not in trials:
                trials[batch] = Trials(
                    subject.name,
                    opened.at(batch),
                    batch,
                    settings.new_tokens,
                    settings.repeats,
                    settings.fingerprint(),
                )
            record = trials[batch].cell(cell, _key(subject, batch, cell))
            longest_s = max(longest_s, record.seconds)
            _keep(evidence, record)
    trials.clear()
    gc.collect()  # before the next model is drawn


def _keep(evidence: Evidence, record: CellRecord) -> None:
    evidence.add(record)
    predicted = record.foretold("tokens_per_s")
    beside = "" if predicted is None else f", predicted {predicted:.1f}"
    say(
        f"{record.key}: {record.median('tokens_per_s'):.1f} tokens/s{beside} ({record.seconds:.0f} s)"
    )


def _key(subject: Subject, batch: int, cell: Cell) -> str:
    return f"{subject.name}/batch-{batch}/{cell.kind}@{cell.share:g}"


def _opening_s(settings: Settings) -> float:
    return 0.0 if settings.changes else _OPENING_S


def _about(device: torch.device, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """The machine and its bus."""
    is_cuda = device.type == "cuda"
    words = (
        "Models under routing replay have random weights: times and bytes are real, the text is not"
    )
    if not is_cuda:
        words = (
            f"On the CPU, not a GPU; link {'emulated' if settings.link else 'host memory'}. {words}"
        )
    if settings.changes:
        words = f"Scaled down to try the script: these numbers mean nothing elsewhere. {words}"
    found: dict[str, Any] = {
        "device": f"{machine_name(str(device))} ({device})",
        "link": "host to device" if is_cuda else settings.link or "host memory to host memory",
        "link_origin": "emulated" if settings.link else "measured",
        "words": words,
        "command": shlex.join([Path(sys.argv[0]).name, *_public(sys.argv[1:])]),
        "quick": options.quick,
        "versions": versions(),
    }
    if is_cuda:
        found["bus"] = _bus(device)
    return found


def _bus(device: torch.device) -> list[tuple[int, float]]:
    """Seconds of one copy out of page-locked memory, by bytes: from blocks of the embedded model to the largest."""
    points: dict[int, float] = {}
    for size in (1 << 17, 1 << 24, 1 << 26):
        profile = measure_link(device, time.perf_counter, block_bytes=size, repeats=5)
        points |= dict(profile.curve(pinned=True, busy=False).points)
    return sorted(points.items())


def _public(arguments: Sequence[str]) -> list[str]:
    return [Path(word).name if word.startswith("/") else word for word in arguments]


def _folder(device: torch.device, options: argparse.Namespace) -> Path:
    if device.type != "cuda":
        return ROOT / "out" / ("gpu-bench-quick" if options.quick else "gpu-bench-cpu")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return ROOT / "traces" / "gpu" / name


def _settings(options: argparse.Namespace) -> Settings:
    make = quick if options.quick else full
    more: dict[str, Any] = {"dtype": options.dtype, "threads": options.threads}
    if options.link:
        LinkSpec.parse(options.link)  # refuse it now, not after a model has been made
    if options.subjects:
        more["subjects"] = tuple(options.subjects.split(","))
        for name in more["subjects"]:
            if name not in (EMBEDDED, *SHAPES) and not Path(name).is_dir():
                raise unknown_name("model", name, (EMBEDDED, *SHAPES))
    if options.kinds:
        more["kinds"] = tuple(options.kinds.split(","))
        for kind in more["kinds"]:
            if kind not in KINDS:
                raise unknown_name("policy or baseline", kind, KINDS)
    if options.batches:
        more["batches"] = tuple(int(number) for number in options.batches.split(","))
    if options.routing:
        more["routing"] = {
            name: Path(path) for name, _, path in (text.partition("=") for text in options.routing)
        }
    return make(options.device, options.link, **more)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument(
        "--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 on the CPU."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Models scaled down: to try the script."
    )
    parser.add_argument("--link", help="Emulate a link on the CPU, for example 1GB/s+20us.")
    parser.add_argument("--limit-s", type=float, default=480.0, help="Stop after so many seconds.")
    parser.add_argument(
        "--out", type=Path, help="Where evidence goes; default: traces/gpu/<device>."
    )
    parser.add_argument("--subjects", help=f"Some of {','.join((*REPLAYED, EMBEDDED))}.")
    parser.add_argument("--kinds", help=f"Some of {','.join(KINDS)}.")
    parser.add_argument("--batches", help="Batch sizes: 1,8.")
    parser.add_argument("--threads", type=int, help="Compute threads on the CPU.")
    parser.add_argument(
        "--routing",
        action="append",
        metavar="MODEL=PATH",
        help="A trace folder, or another tool's recording, to replay instead of the demo's.",
    )
    return parser.parse_args()


def say(words: str) -> None:
    """Tell on stderr what is being done."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
