"""Steps and copies as events of the Chrome trace format, which Perfetto (ui.perfetto.dev) opens.

Pure: rows in, lines of JSON out. Real traces and simulated runs bring the same columns, so both look alike. Every
track is a serial resource, because Perfetto drops a slice that overlaps another of its track without a word; times
are whole nanoseconds from 0, printed in microseconds with three decimals, because its parser uses doubles.
Format: "Trace Event Format" (Google, 2016) as read by Perfetto v52.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..schema import WHOLE_STEP

LAPS = {
    "mixer_s": "mixer",
    "readback_s": "read-back",
    "decision_s": "decision",
    "lookahead_s": "look-ahead",
    "stall_s": "wait for experts",
    "experts_s": "experts",
    "cpu_s": "wait for CPU",
}
"""Parts of a layer's time in the order they run, and what their slices are called."""

PASSES, COMPUTE, PREDICTOR = "forward passes", "compute", "predictor"
_PROCESS = 1
_NS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyColumns:
    """Copies, one entry each: `layer`, `expert`, `why`, `step`, `bytes`; times in seconds, `needed_s` NaN if never.

    `stream` names the resource that carried it; empty for the one link there is.
    """

    step: np.ndarray
    layer: np.ndarray
    expert: np.ndarray
    bytes: np.ndarray
    why: Sequence[str]
    queued_s: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray
    needed_s: np.ndarray
    stream: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took time on one track; nanoseconds from the start of the run."""

    track: str
    name: str
    start: int
    end: int
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Arrow:
    """From a copy to what waited for it: a track and a time inside a slice of it, twice."""

    from_track: str
    from_time: int
    to_track: str
    to_time: int


@dataclass(slots=True)
class Timeline:
    """What is drawn, and how long the run took, in nanoseconds. `is_cut`: only a window of the run's steps is drawn."""

    title: str
    slices: list[Slice] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    total: int = 0
    is_cut: bool = False

    @property
    def tracks(self) -> list[str]:
        """Names of the tracks, in the order they are shown."""
        found = list(dict.fromkeys(item.track for item in self.slices))
        first = [name for name in (PASSES, COMPUTE, PREDICTOR) if name in found]
        return first + sorted(name for name in found if name not in first)


def build_timeline(
    title: str,
    steps: Mapping[str, Sequence[Any] | np.ndarray],
    copies: CopyColumns | None = None,
    window: range | None = None,
) -> Timeline:
    """Lay out the rows of a run.

    `steps` are the columns of the steps table; laps that are missing took no time. `window`: numbers of the steps to
    draw; times stay those of the whole run. Copies that began before the first step, such as those that fill the
    slots, move the clock: it starts at 0 with whatever came first.
    """
    count = len(steps["step"])
    columns = {name: np.asarray(values) for name, values in steps.items()}
    starts = _times(columns["start_s"], count)
    is_real = np.isfinite(starts)
    begins = [starts[is_real].min()] if is_real.any() else []
    if copies is not None and len(copies):
        begins.append(float(np.min(copies.start_s)))
    zero = min(begins, default=0.0)
    found = Timeline(title, is_cut=window is not None)
    compute = _lay_steps(found, columns, zero, window)
    if copies is not None and len(copies):
        _lay_copies(found, copies, compute, zero, window)
    found.slices.sort(key=lambda item: (item.start, item.end))
    ends = _times(columns["total_s"], count) + starts
    last = [_ns(float(np.nanmax(ends)) - zero)] if is_real.any() else []
    if copies is not None and len(copies):
        last.append(_ns(float(np.max(copies.end_s)) - zero))
    found.total = max([*last, *(item.end for item in found.slices)], default=0)
    return found


def event_lines(timeline: Timeline) -> Iterator[str]:
    """One JSON document, line by line, in order of time."""
    numbers = {track: number for number, track in enumerate(timeline.tracks, 1)}
    yield '{"displayTimeUnit":"ns","traceEvents":['
    lines = _events(timeline, numbers)
    held = next(lines, None)
    for line in lines:
        yield f"{held},"
        held = line
    yield from (held,) if held is not None else ()
    total = {"run_ns": timeline.total, "title": timeline.title, "is_window": timeline.is_cut}
    yield f'],"otherData":{json.dumps(total)}}}'


def _events(timeline: Timeline, numbers: Mapping[str, int]) -> Iterator[str]:
    yield _named("process_name", timeline.title, 0)
    for track, number in numbers.items():
        yield _named("thread_name", track, number)
        yield _event("M", number, name="thread_sort_index", args={"sort_index": number})
    arrows = sorted(enumerate(timeline.arrows), key=lambda pair: pair[1].from_time)
    for item in timeline.slices:
        yield _event(
            "X",
            numbers[item.track],
            ts=item.start,
            dur=item.end - item.start,
            name=item.name,
            args=dict(item.args),
        )
    for number, arrow in arrows:
        yield _event(
            "s", numbers[arrow.from_track], ts=arrow.from_time, id=number, cat="copy", name="copy"
        )
        yield _event(
            "f",
            numbers[arrow.to_track],
            ts=arrow.to_time,
            id=number,
            cat="copy",
            name="copy",
            bp="e",
        )


def _named(kind: str, name: str, track: int) -> str:
    return _event("M", track, name=kind, args={"name": name})


def _event(
    kind: str, track: int, *, ts: int | None = None, dur: int | None = None, **rest: Any
) -> str:
    """One event. Times are written by hand: a float would lose the nanoseconds of a long run."""
    times = "".join(
        f'"{name}":{ns // 1000}.{ns % 1000:03d},'
        for name, ns in (("ts", ts), ("dur", dur))
        if ns is not None
    )
    body = json.dumps(rest, ensure_ascii=False, separators=(",", ":"))[1:]
    return f'{{"ph":"{kind}","pid":{_PROCESS},"tid":{track},{times}{body}'


@dataclass(frozen=True, slots=True)
class _Compute:
    """Layer rows in order of time, with the slice that arrows into them end at (−1: none)."""

    start: np.ndarray
    end: np.ndarray
    target: np.ndarray


def _lay_steps(
    found: Timeline, columns: Mapping[str, np.ndarray], zero: float, window: range | None
) -> _Compute:
    rows: list[tuple[int, int, int]] = []
    count = len(columns["step"])
    begin = _times(columns["start_s"], count) - zero
    end = begin + _times(columns["total_s"], count)
    laps = {name: _times(columns[name], count) for name in LAPS if name in columns}
    facts = [
        name for name in ("batch", "tokens", "context", "distinct", "waves") if name in columns
    ]
    schedule = _times(columns.get("schedule_s", np.zeros(count)), count)
    passes: list[tuple[int, int, int, int]] = []
    order = np.argsort(begin, kind="stable")
    until = {PASSES: 0, COMPUTE: 0}
    for row in order.tolist():
        step, layer = int(columns["step"][row]), int(columns["layer"][row])
        if not np.isfinite(begin[row]) or (window is not None and step not in window):
            continue
        args = {"step": step, **{name: int(columns[name][row]) for name in facts}}
        track = PASSES if layer == WHOLE_STEP else COMPUTE
        # Rows of one run follow each other; a nanosecond of rounding must not make them overlap.
        first = max(_ns(float(begin[row])), until[track])
        last = max(_ns(float(end[row])), first)
        until[track] = last
        if layer == WHOLE_STEP:
            phase = str(columns["phase"][row])
            found.slices.append(Slice(PASSES, f"{phase} {step}", first, last, args))
            scheduled = _ns(float(schedule[row])) if np.isfinite(schedule[row]) else 0
            passes.append((first, last, scheduled, step))
            continue
        seconds = {name: float(values[row]) for name, values in laps.items()}
        args = {"layer": layer, **args}
        rows.append((first, last, _lay_laps(found, seconds, float(begin[row]), first, last, args)))
    _lay_around(found, passes, rows)
    starts, ends, targets = np.asarray(rows, dtype=np.int64).reshape(-1, 3).T
    return _Compute(starts, ends, targets)


def _lay_around(
    found: Timeline,
    passes: Sequence[tuple[int, int, int, int]],
    rows: Sequence[tuple[int, int, int]],
) -> None:
    """What a pass does before its first layer and after its last one."""
    firsts = [first for first, _, _ in rows]
    for begin, end, scheduled, step in passes:
        inside = range(bisect_left(firsts, begin), bisect_left(firsts, end))
        first = rows[inside[0]][0] if inside else end
        last = rows[inside[-1]][1] if inside else end
        if scheduled:
            until = min(begin + scheduled, first)
            found.slices.append(Slice(COMPUTE, "scheduling", begin, until, {"step": step}))
        if end > last:
            found.slices.append(Slice(COMPUTE, "after the layers", last, end, {"step": step}))


def _lay_laps(
    found: Timeline,
    laps: Mapping[str, float],
    begin_s: float,
    first: int,
    last: int,
    args: Mapping[str, Any],
) -> int:
    """The parts of one layer, one after another; returns where arrows to it end, or −1."""
    place, seconds, target = first, begin_s, -1
    for name, text in LAPS.items():
        took = laps.get(name, 0.0)
        if not took > 0:  # NaN neither: not measured
            continue
        seconds += took
        end = min(max(_ns(seconds), place), last)
        track = PREDICTOR if name == "lookahead_s" else COMPUTE
        if end > place:
            found.slices.append(Slice(track, f"L{args['layer']} {text}", place, end, args))
            if name == "experts_s":
                target = place
            elif name == "stall_s":
                target = end - 1
        place = end
    return target


def _lay_copies(
    found: Timeline, copies: CopyColumns, compute: _Compute, zero: float, window: range | None
) -> None:
    lanes: dict[str, list[int]] = {}
    begin, end = copies.start_s - zero, copies.end_s - zero
    for row in np.argsort(begin, kind="stable").tolist():
        step = int(copies.step[row])
        if window is not None and step not in window:
            continue
        first = _ns(float(begin[row]))
        last = max(_ns(float(end[row])), first)
        why = str(copies.why[row])
        stream = str(copies.stream[row]) if len(copies.stream) else ""
        track = _lane(lanes, f"link: {why}", first, last)
        needed = float(copies.needed_s[row]) - zero
        args: dict[str, Any] = {
            "layer": int(copies.layer[row]),
            "expert": int(copies.expert[row]),
            "why": why,
            "bytes": int(copies.bytes[row]),
            "step": step,
            "queued_us": max(0, first - _ns(float(copies.queued_s[row]) - zero)) / 1000,
        }
        if stream:
            args["stream"] = stream
        name = f"L{args['layer']}/E{args['expert']}"
        found.slices.append(Slice(track, name, first, last, args))
        # It was waited for if compute wanted it before it had come.
        if np.isfinite(needed) and _ns(needed) < last and last > first:
            target = _target(compute, _ns(needed))
            # Time runs forward along an arrow, or Perfetto drops it.
            if target > first:
                found.arrows.append(Arrow(track, min(last, target) - 1, COMPUTE, target))


def _lane(lanes: dict[str, list[int]], name: str, first: int, last: int) -> str:
    """A track that is free: a prefetch that gives way to another copy is still under way meanwhile."""
    ends = lanes.setdefault(name, [])
    for number, end in enumerate(ends):
        if end <= first:
            ends[number] = last
            break
    else:
        number = len(ends)
        ends.append(last)
    return name if number == 0 else f"{name} ({number + 1})"


def _target(compute: _Compute, needed: int) -> int:
    row = int(np.searchsorted(compute.start, needed, side="right")) - 1
    if row < 0 or needed > int(compute.end[row]):
        return -1
    return int(compute.target[row])


def _times(values: Sequence[Any] | np.ndarray, count: int) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(count)


def _ns(seconds: float) -> int:
    return max(0, round(float(seconds) * _NS))
