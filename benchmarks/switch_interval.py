"""What Python's switch interval costs a policy whose predictor is written in Python.

The copy thread needs its turn to go on to the next copy. With Python's own interval a predictor that is at work keeps
it waiting; with the runtime's it does not. The embedded model behind an emulated link, half of the experts, the same
policies under both intervals in turns; LRU has no predictor and is the control.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench_common import Report, Table, options_of, parser
from bench_embedded import Embedded, built, cut, hint, traced
from expertflow.simulator.lessons import lessons_of
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.workload import workload_of
from expertflow.tracer import switching
from expertflow.tracer.load import choose_device
from expertflow.tracer.placement import use_threads

SCRIPT = "switch_interval.py"
LINK, SHARE = "1GB/s+20us", 0.5
PYTHONS_S = 5e-3


def main() -> None:
    """Run the policies in turns, compare medians."""
    options = options_of(parser(__doc__))
    batch, rounds, pieces, epochs = (4, 1, 40, 1) if options.quick else (16, 5, 200, 4)
    use_threads(1, choose_device("cpu"))
    report = Report(SCRIPT, options)
    with tempfile.TemporaryDirectory() as name:
        compare(report, Path(name), batch, rounds, pieces, epochs)
    report.finish()


def compare(
    report: Report, folder: Path, batch: int, rounds: int, pieces: int, epochs: int
) -> None:
    """One table."""
    learned = traced(folder / "pieces", cut(folder, pieces), 24, 16)
    built(learned, folder / "predictor", epochs)
    lessons = lessons_of(workload_of(learned), frozenset({"maps"}))
    model = Embedded(folder, {batch: batch}, link=LINK, new_tokens=24)
    slots = round(SHARE * model.shape.total_experts)
    specs = {
        "LRU": make_spec(slots=slots),
        "map search": make_spec(slots=slots, predictor="map_search", lessons=lessons),
        "PLEC, re-divided": make_spec(
            slots=slots,
            cache="plec",
            allocation="global",
            predictor="path",
            predictor_params={"per_token": model.shape.top_k},
        ),
    }
    trials = model.trials("switch", batch, measures_memory=False)
    speeds: dict[tuple[str, float], list[float]] = {}
    for number in range(rounds):
        hint(f"round {number + 1} of {rounds}")
        for seconds in (PYTHONS_S, switching.SWITCH_S):
            switching.SWITCH_S = seconds
            for words, spec in specs.items():
                found = trials.run(spec).tokens_per_s
                speeds.setdefault((words, seconds), []).append(found)
    model.machine.close()
    rows = []
    for words in specs:
        before, after = (
            statistics.median(speeds[words, seconds]) for seconds in (PYTHONS_S, switching.SWITCH_S)
        )
        rows.append((words, f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.1%}"))
    report.table(
        Table(
            f"tokens/s at batch {batch}, {SHARE:.0%} of the experts, {LINK} (emulated), medians of {rounds}",
            ("", f"{PYTHONS_S * 1e3:.0f} ms", f"{switching.SWITCH_S * 1e6:.0f} µs", "gain"),
            rows,
        )
    )


if __name__ == "__main__":
    main()
