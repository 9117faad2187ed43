"""What a folder or a file of results says, as sections that are written as HTML or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from ..simulator.report import result_rows
from ..simulator.result import Result, Tuning, Verdict
from ..simulator.sweep_folder import SweepFile
from ..tracer.errors import InputError
from ..tracer.schema import Manifest
from ..tracer.types import Provenance
from . import results, words
from .data import Catalog, Found, Problem, discover, discover_file, sequence_summary, sweep_table
from .figures import candidates, capacity, compare, routing, sweep, time_split, verify
from .patterns import stats_of
from .routing import routing_summary

MOST_RESULTS = 4
MOST_EACH = 4
"""Traces, tunings, verdicts and sweeps of one folder that a report goes into; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure and what it shows in words."""

    fig: go.Figure
    alt: str
    finding: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table and what it holds."""

    caption: str
    frame: pd.DataFrame


@dataclass(slots=True)
class Section:
    """A heading and what stands below it, in this order."""

    title: str
    lines: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A title, a line that says what it is about, and sections."""

    title: str
    about: str
    sections: tuple[Section, ...]


def report_on(path: Path) -> Report:
    """Read a file of results, a trace or a folder of them. Raises InputError if there is nothing to report."""
    if not path.exists():
        raise InputError(
            f"{path} does not exist. Give a result, tuning, verdict or policy (.json), a trace or a folder of such."
        )
    catalog = discover(path) if path.is_dir() else discover_file(path)
    sections = [section for section in _sections(catalog) if section is not None]
    if not sections:
        reasons = "; ".join(f"{p.name}: {p.reason.rstrip('.')}" for p in catalog.problems[:3])
        why = f" ({reasons})" if reasons else ""
        raise InputError(
            f"{path} holds nothing to report{why}. Make something with `expertflow-trace run`, `simulate`, `tune`, "
            "`sweep` or `verify`."
        )
    return Report(
        title=f"ExpertFlow report: {path.resolve().name}",
        about="What was recorded, what was predicted from it, and what was measured. Predicted numbers are drawn as "
        "outlines or hatched, measured ones solid.",
        sections=(*sections, *_problems(catalog), _origins(catalog)),
    )


def _sections(catalog: Catalog) -> Iterator[Section | None]:
    yield from map(_verdict, catalog.verdicts[:MOST_EACH])
    yield from map(_tuning, catalog.tunings[:MOST_EACH])
    yield from map(_trace, catalog.traces[:MOST_EACH])
    yield _results(catalog)
    yield from map(_sweep, catalog.sweeps[:MOST_EACH])
    yield _policies(catalog)


def _verdict(found: Found[Verdict]) -> Section:
    verdict = found.value
    state = "Validated" if verdict.validated else "NOT validated"
    section = Section(f"Did the forecast hold? {state} ({found.name})")
    section.lines = [verdict.summary, *verdict.warnings]
    if any(
        r.link_origin == "emulated" for run in verdict.runs for r in (run.predicted, *run.measured)
    ):
        section.lines.append(words.EMULATED)
    if not verdict.runs:
        return section
    if any(run.checks for run in verdict.runs):
        section.pictures.append(
            _picture(lambda: verify.checks(verdict.runs), verify.checks_finding(verdict.runs))
        )
    section.pictures.append(
        _picture(
            lambda: time_split.time_split(verdict.runs), time_split.time_split_finding(verdict.runs)
        )
    )
    rows = [
        {
            "configuration": run.label,
            "quantity": words.label(check.quantity),
            "predicted": words.amount(check, check.predicted),
            "measured": words.amount(check, check.measured),
            "gap": words.gap(check, check.gap),
            "tolerance": f"±{words.gap(check, check.tolerance, sign=False)}",
            "within": ("yes" if check.passed else "NO") if check.is_judged else "not judged",
        }
        for run in verdict.runs
        for check in run.checks
    ]
    section.tables.append(Table("Every check", pd.DataFrame(rows)))
    return section


def _tuning(found: Found[Tuning]) -> Section:
    tuning = found.value
    section = Section(f"Which policy, for a budget of {tuning.budget} ({found.name})")
    section.lines = list(tuning.explanation)
    if tuning.candidates:
        section.pictures.append(
            _picture(
                lambda: candidates.speed(tuning.candidates, chosen=tuning.chosen),
                candidates.speed_finding(tuning.candidates, tuning.chosen),
            )
        )
        section.tables.append(
            Table("Candidates, predicted", candidate_table(tuning.candidates[:12]))
        )
    if tuning.curve:
        some = next((r for r in tuning.candidates if r.slots < r.total_experts), None)
        budget = some.slots / some.total_experts if some else None
        floor = capacity.floor_share(some) if some else None
        section.pictures.append(
            _picture(
                lambda: capacity.capacity(tuning.curve, floor=floor, budget=budget),
                capacity.capacity_finding(tuning.curve, budget),
            )
        )
    return section


def candidate_table(found: Sequence[Result]) -> pd.DataFrame:
    """Predicted or measured results as a person reads them."""
    rows = [
        {
            "policy": r.label,
            "source": r.source,
            "tokens/s": words.rate(r.tokens_per_s),
            "first token": words.seconds(r.ttft_s),
            "further token": words.seconds(r.tpot_s),
            "decode hits": words.percent(r.decode.hit_rate),
            "moved per token": words.size(r.bytes_per_token),
            "r": f"{r.slots_ratio:.2f}",
            "peak device memory": words.size(r.peak_device_bytes),
        }
        for r in found
    ]
    return pd.DataFrame(rows)


def _trace(found: Found[Manifest]) -> Section:
    manifest, shape, hardware = found.value, found.value.shape, found.value.hardware
    section = Section(f"What was recorded ({found.name})", lines=list(manifest.warnings))
    section.facts = [
        ("model", f"{shape.model_id} ({shape.architecture}, {shape.dtype})"),
        (
            "experts",
            f"{shape.num_moe_layers} layers × {shape.num_experts}, {shape.top_k} per token, "
            f"{words.size(shape.expert_bytes)} each",
        ),
        ("device", f"{hardware.name} ({hardware.device})"),
        ("link", f"{hardware.link.name}: {words.origin(hardware.link.origin)}"),
        ("recorded", ", ".join(manifest.recorded)),
    ]
    summary = sequence_summary(found)
    if not isinstance(summary, Problem):
        section.facts.append(
            (
                "tokens",
                f"{summary.prompt_tokens:,} fed in and {summary.generated_tokens:,} generated in "
                f"{summary.sequences:,} sequences",
            )
        )
    counted = routing_summary(found)
    if isinstance(counted, Problem):
        section.lines.append(f"The routing cannot be read: {counted.reason}")
        return section
    phase = "decode" if "decode" in counted.phases() else counted.phases()[0]
    counts = counted.select(phase, "all")
    section.pictures.append(
        _picture(lambda: routing.heatmap(counts, phase), routing.heatmap_finding(counts, phase))
    )
    by_phase = {name: counted.select(name, "all") for name in counted.phases()}
    section.pictures.append(
        _picture(lambda: routing.skew(by_phase), routing.skew_finding(by_phase))
    )
    stats = stats_of(found)
    if not isinstance(stats, Problem):
        section.lines += [finding.text for finding in stats.findings]
    return section


def _results(catalog: Catalog) -> Section | None:
    if not catalog.results:
        return None
    section = Section("Single runs")
    chosen = {f"{found.value.label} ({found.name})": found.value for found in catalog.results}
    section.tables.append(Table("Results", candidate_table(list(chosen.values()))))
    if len(chosen) == 1:
        (result,) = chosen.values()
        section.facts = result_rows(result)
        return section
    first = dict(list(chosen.items())[:MOST_RESULTS])
    section.pictures.append(
        _picture(lambda: compare.compare(first), compare.compare_finding(first))
    )
    if rows := results.differing(first):
        table = pd.DataFrame.from_dict(rows, orient="index", columns=list(first))
        section.tables.append(Table("Settings that differ", table.reset_index(names="setting")))
    if reasons := results.unlike(first):
        section.lines.append(f"Unlike runs: these were made {', '.join(reasons)}.")
    return section


def _sweep(found: Found[SweepFile]) -> Section | None:
    rows = sweep_table(found)
    section = Section(f"What was swept ({found.name})", lines=list(found.value.warnings))
    if isinstance(rows, Problem):
        section.lines.append(f"Its rows cannot be read: {rows.reason}")
        return section
    table = rows.to_pandas()
    frame = table[(table["error"] == "") & table["tokens_per_s"].notna()].reset_index(drop=True)
    if not len(frame):
        return section
    x, y = "peak_device_bytes", "tokens_per_s"
    usable = frame[~frame["is_bound"]]
    section.pictures = [
        _picture(lambda: sweep.pareto(frame, x, y), sweep.pareto_finding(frame, x, y)),
        _picture(lambda: sweep.importance(usable, y), sweep.importance_finding(usable, y)),
    ]
    front = sweep.front_of(frame, x, y)
    shown = pd.DataFrame(
        {
            "policy": front["label"],
            "tokens/s": [words.rate(value) for value in front["tokens_per_s"]],
            "decode hits": [words.percent(value) for value in front["decode_hit_rate"]],
            "peak device memory": [words.size(value) for value in front["peak_device_bytes"]],
        }
    )
    section.tables.append(Table("The front: beaten by none in both, predicted", shown))
    return section


def _policies(catalog: Catalog) -> Section | None:
    if not catalog.policies:
        return None
    section = Section("Policies")
    for found in catalog.policies:
        policy = found.value
        shape = policy.shape
        section.facts.append(
            (
                found.name,
                f"{policy.behaviour.label}, {words.size(policy.behaviour.slots * shape.expert_bytes)} of experts of "
                f"{shape.model_id}, behaviour {policy.behaviour_hash}",
            )
        )
        section.commands.append(f"expertflow-trace deploy {found.name}")
    return section


def _problems(catalog: Catalog) -> list[Section]:
    if not catalog.problems:
        return []
    return [Section("What could not be read", facts=[(p.name, p.reason) for p in catalog.problems])]


def _origins(catalog: Catalog) -> Section:
    """Where everything comes from: enough to make it again."""
    section = Section("Where this comes from, and how to make it again")
    every: list[tuple[str, Provenance]] = [
        (found.name, found.value.provenance)
        for kind in (
            catalog.traces, catalog.machines, catalog.tunings, catalog.verdicts, catalog.results, catalog.sweeps,
        )
        for found in kind
    ]  # fmt: skip
    every.sort(key=lambda pair: pair[1].created)
    known = {_versions(made) for _, made in every}
    for name, made in every:
        own = f"; {_versions(made)}" if len(known) > 1 else ""
        section.facts.append(
            (name, f"made {made.created}, seed {made.seed}, {made.text} text{own}")
        )
    if len(known) == 1:
        section.facts.append(("versions of all", known.pop()))
    section.commands = list(dict.fromkeys(made.command for _, made in every if made.command))
    return section


def _versions(made: Provenance) -> str:
    return ", ".join(f"{key} {value}" for key, value in made.versions.items())


def _picture(draw: Callable[[], go.Figure], finding: Sequence[str]) -> Picture:
    return Picture(draw(), ". ".join(finding), finding[0])
