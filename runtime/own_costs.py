"""Measures what one policy's own code takes, from a run of it on other prompts than it will be judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..simulator.account import RunRecord
from ..simulator.costs import CostModel
from ..simulator.own_costs import OwnCosts, PhaseOwnCosts
from ..tracer.schema import WHOLE_STEP
from ..tracer.types import Phase
from .loads import loads_by_event

_TRIMMED = 0.05
_Floats = npt.NDArray[np.float64]


def own_costs(record: RunRecord, costs: CostModel, plain: RunRecord | None) -> OwnCosts:
    """Seconds that a policy adds to what `costs` charge; the rows are those of one walk.

    `plain` is a run without it just before, for what runs beside the model and takes cores from it (a path predictor,
    experts on the CPU); others cannot slow down what they do not run beside.
    """
    return OwnCosts(
        prefill=_of_phase("prefill", record, costs, plain),
        decode=_of_phase("decode", record, costs, plain),
    )


def _of_phase(
    phase: Phase, record: RunRecord, costs: CostModel, plain: RunRecord | None
) -> PhaseOwnCosts:
    rows = _rows(record, phase)
    if not len(rows["step"]):
        return PhaseOwnCosts()
    rows["lookahead_s"] = np.nan_to_num(rows["lookahead_s"])  # no predictor
    asking = costs.phase(phase).lookahead.weights[2] * rows["prefetches"]
    predicting = np.maximum(0.0, rows["lookahead_s"] - asking)
    first = rows["layer"] == rows["layer"].min()
    usual = _mean(predicting[~first]) if (~first).any() else 0.0
    # A prompt's tokens are looked at one by one, and prompts differ in length.
    by_event = phase == "decode"
    beside_s = 0.0
    if plain is not None:
        before = _rows(plain, phase)
        beside_s = _compute_excess(rows, costs, phase) - _compute_excess(before, costs, phase)
    return PhaseOwnCosts(
        event_s=usual if by_event else 0.0,
        token_s=0.0 if by_event else usual / float(rows["tokens"].mean()),
        pass_s=max(0.0, _mean(predicting[first]) - usual),
        decision_s=_decision_excess(rows, costs, phase),
        beside_s=beside_s,
    )


def _decision_excess(rows: Mapping[str, _Floats], costs: CostModel, phase: Phase) -> float:
    """Seconds by which the mean event's decision is longer than charged."""
    weights = np.asarray(costs.phase(phase).decision.weights)
    features = np.stack([np.ones(len(rows["step"])), rows["distinct"], rows["demands"]])
    return _mean(rows["decision_s"] - weights @ features)


def _compute_excess(rows: Mapping[str, _Floats], costs: CostModel, phase: Phase) -> float:
    """Seconds by which the mean event computes longer than charged."""
    fitted, one = costs.phase(phase), np.ones(len(rows["step"]))
    tokens, context = rows["tokens"], rows["tokens"] * rows["context"]
    before = [rows["demands_before"], rows["prefetches_before"]]
    mixer = np.asarray(fitted.mixer.weights) @ np.stack([one, tokens, context, *before])
    own = [rows["demands"], rows["prefetches"], rows["waves"] - 1]
    experts = np.asarray(fitted.experts.weights) @ np.stack([one, tokens, rows["on_device"], *own])
    return _mean(rows["mixer_s"] - mixer + rows["experts_s"] - np.maximum(0.0, experts))


def _rows(record: RunRecord, phase: Phase) -> dict[str, _Floats]:
    """Columns of the events of a phase, with the loads each of them and the one before asked for."""
    is_event = np.asarray(
        [
            of == phase and layer != WHOLE_STEP
            for of, layer in zip(record.steps["phase"], record.steps["layer"], strict=True)
        ]
    )
    names = (
        "step", "layer", "tokens", "context", "distinct", "waves", "mixer_s", "experts_s", "decision_s", "lookahead_s",
    )  # fmt: skip
    rows = {name: np.asarray(record.steps[name], dtype=np.float64)[is_event] for name in names}
    places = list(zip(rows["step"].astype(int), rows["layer"].astype(int), strict=True))
    on_cpu = Counter((e.step, e.layer) for e in record.log if e.detail == "cpu")
    rows["on_device"] = rows["distinct"] - [on_cpu[place] for place in places]
    names = ("demands", "prefetches")
    for name, counts in zip(names, loads_by_event(record.log), strict=True):
        found = np.asarray([counts[place] for place in places], dtype=np.float64)
        rows |= {name: found, f"{name}_before": np.append(0.0, found)[:-1]}
    return rows


def _mean(seconds: _Floats) -> float:
    """Without the extremes of both sides: a thread that lost its core is not what a policy costs."""
    cut = int(_TRIMMED * len(seconds))
    return float(np.sort(seconds)[cut : len(seconds) - cut].mean())
