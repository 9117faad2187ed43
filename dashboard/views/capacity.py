"""Capacity: what memory for experts buys, in speed and in hits, whichever cache looks after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pandas as pd
import streamlit as st

from ...simulator.result import Result
from .. import parts, predictions, words
from ..data import Catalog
from ..figures import memory as figures
from ..predictions import Desk, Question
from . import desk as desks

QUESTION: Final = "How much memory do I need?"
SHARES: Final = (0.03125, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_NAMED: Final = 5


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Capacity", QUESTION)
    parts.problems(catalog.problems)
    if (chosen := desks.choose(catalog)) is None:
        return
    _, trace = chosen
    places = st.columns(2)
    with places[0]:
        machine = desks.choose_machine(catalog, trace)
    if machine is None or (desk := desks.ready(trace, machine)) is None:
        return
    points = _points(desk)
    resident = resident_speed(desk)
    with places[1]:
        wanted = st.slider(
            "Wanted speed, share of that with everything resident",
            10,
            100,
            value=80,
            step=1,
            format="%d%%",
            key="wanted",
            bind="query-params",
        )
    marks = marks_of(desk, points, resident, resident * wanted / 100)
    answer = sentence(desk, points, marks, wanted)
    (st.success if marks.answer else st.warning)(words.plain(answer), icon=":material/memory:")
    desks.origin(desk)
    _charts(points, desk, marks)
    _table(points, desk)
    st.caption("The same in a terminal:")
    st.code(
        f"expertflow-trace curve {parts.shell_path(trace.path)} --caches lru,lfu,belady",
        language="bash",
        wrap_lines=True,
    )


def _points(desk: Desk) -> list[tuple[str, Result]]:
    names = [*predictions.members(desk, "cache"), "belady"]
    sizes = slot_sizes(desk.shape_experts)
    bar = st.progress(0.0, "Predicting every cache at every size …")
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % 8 == 0:
            bar.progress(done / (len(names) * len(sizes)), "Predicting every cache at every size …")

    points = predictions.grid(desk, names, sizes, advance=advance)
    bar.empty()
    return points


def slot_sizes(experts: int) -> list[int]:
    """The budgets of the curve, in slots."""
    return sorted({max(1, round(share * experts)) for share in SHARES})


def resident_speed(desk: Desk) -> float:
    """Tokens/s if every expert were resident and no policy at work: a bound."""
    result = predictions.ask(desk, Question(slots=desk.shape_experts), with_bounds=True)
    return result.bounds.all_resident_tokens_per_s


def marks_of(
    desk: Desk, points: list[tuple[str, Result]], resident: float, wanted: float
) -> figures.Marks:
    """The floor, r = 1, and the fewest slots that reach the wanted speed."""
    workload = desk.judge.forecaster.workload
    return figures.Marks(
        expert_bytes=desk.whole.shape.expert_bytes,
        floor=predictions.floor_slots(desk),
        tight=workload.mean_distinct("decode") * workload.num_layers,
        resident_tokens_per_s=resident,
        wanted_tokens_per_s=wanted,
        answer=_answer(desk, points, wanted),
    )


def _answer(desk: Desk, points: list[tuple[str, Result]], wanted: float) -> int | None:
    """The fewest slots with which the best cache there is reaches a speed."""
    usable = [(name, result) for name, result in points if name != "belady"]
    good = [
        (result.slots, -result.tokens_per_s, name)
        for name, result in usable
        if result.tokens_per_s >= wanted
    ]
    if not good:
        return None
    high, _, name = min(good)
    low = max((result.slots for _, result in usable if result.slots < high), default=0)
    return predictions.smallest(desk, Question(slots=high, cache=name), wanted, low, high)


def sentence(
    desk: Desk, points: list[tuple[str, Result]], marks: figures.Marks, wanted: int
) -> str:
    """The answer to the page's question, in words."""
    asked = (
        f"{words.rate(marks.wanted_tokens_per_s or 0)} tokens/s ({wanted} % of the "
        f"{words.rate(marks.resident_tokens_per_s)} with everything resident)"
    )
    if marks.answer is None:
        best = max((r for name, r in points if name != "belady"), key=lambda r: r.tokens_per_s)
        return (
            f"No cache reaches {asked} on this machine without prefetch: the fastest is {best.label} at "
            f"{words.rate(best.tokens_per_s)} tokens/s. Ask for less, or try a predictor and another link on What-if."
        )
    at_size = {name: r for name, r in points if name != "belady" and r.slots >= marks.answer}
    name = max(
        at_size,
        key=lambda n: (
            predictions.ask(desk, Question(slots=marks.answer or 1, cache=n)).tokens_per_s
        ),
    )
    found = predictions.ask(desk, replace(Question(slots=marks.answer), cache=name))
    floor = " That is below the floor." if marks.answer < marks.floor else ""
    return (
        f"For {asked} you need {words.size(marks.answer * marks.expert_bytes)} for {marks.answer} of "
        f"{desk.shape_experts} experts with {name}: {words.size(found.peak_device_bytes)} of device memory in "
        f"all, {words.percent(found.decode.hit_rate, 0)} hits in decode, r = {found.slots_ratio:.2f}.{floor}"
    )


def _charts(points: list[tuple[str, Result]], desk: Desk, marks: figures.Marks) -> None:
    frame = figures.memory_frame(points, desk.whole.shape.expert_bytes)
    caches = [name for name in dict.fromkeys(frame["cache"]) if "belady" not in name]
    named = st.multiselect(
        "Caches to name",
        caches,
        default=named_caches(frame),
        max_selections=6,
        key="caches",
        bind="query-params",
        help="The others are drawn in grey; point at a line to see its name.",
    )
    parts.chart(
        figures.speed(frame, named, marks),
        frame,
        name="speed-over-memory",
        alt="Predicted tokens per second over memory for experts, by cache. "
        + ". ".join(figures.speed_finding(frame)),
    )
    parts.chart(
        figures.hits(frame, named, marks),
        frame,
        name="hits-over-memory",
        alt="Decode hit rate over memory for experts, by cache. "
        + ". ".join(figures.hits_finding(frame, marks)),
    )


def named_caches(frame: pd.DataFrame) -> list[str]:
    """The plain ones that everything is compared with, and those that are fastest at some size."""
    best = figures.best_frame(frame)["cache"].value_counts().index.tolist()
    plain = [name for name in ("lru", "static", "none") if name in set(frame["cache"])]
    return [*plain, *(name for name in best if name not in plain)][:_NAMED]


def _table(points: list[tuple[str, Result]], desk: Desk) -> None:
    frame = figures.memory_frame(points, desk.whole.shape.expert_bytes)
    best = figures.best_frame(frame)
    table = pd.DataFrame(
        {
            "experts resident": best["share"],
            "slots": best["slots"],
            "for experts": [words.size(value) for value in best["expert_bytes"]],
            "device memory in all": [words.size(value) for value in best["peak_device_bytes"]],
            "fastest cache": best["cache"],
            "tokens/s": best["tokens_per_s"].round(1),
            "decode hits": best["decode_hit_rate"],
            "r": best["r"].round(2),
        }
    )
    st.header("The fastest cache at each size")
    st.dataframe(
        table,
        hide_index=True,
        width="stretch",
        height="content",
        column_config={
            "experts resident": st.column_config.NumberColumn(format="percent"),
            "decode hits": st.column_config.NumberColumn(format="percent"),
        },
    )
