"""Policy: what was chosen, on what evidence, and how to run it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd
import streamlit as st

from ...simulator.policy.spec import PolicyFile, PolicySpec
from ...simulator.result import Result, Tuning, VerifiedRun
from ...tracer.errors import ExpertFlowError, InputError
from ...tracer.records import from_json, to_json
from .. import parts, predictions, results, words
from ..data import Catalog, Found
from ..figures import candidates as candidate_figures
from ..figures import policy as figures

QUESTION: Final = "Which policy was chosen, why, and how do I run it?"
_WORDS: Final[Mapping[str, str]] = {
    "cache": "Cache: who is evicted",
    "allocation": "Allocation: slots by layer",
    "predictor": "Predictor: who is prefetched",
    "scheduler": "Scheduler: who runs together",
    "misses": "Misses: what is done about them",
    "routing": "Routing: which experts compute",
}


def render(catalog: Catalog) -> None:
    """Draw the page for whatever the catalog holds."""
    parts.header("Policy", QUESTION)
    parts.problems(catalog.problems)
    if not catalog.policies:
        parts.empty("There is no policy in this folder yet.", parts.FILL_TUNING)
        if not catalog.traces:
            parts.empty("Tuning needs a trace, and there is none here.", parts.FILL_TRACE)
        return
    found = _choose(catalog.policies)
    policy = found.value
    st.markdown(f"**{words.plain(in_a_sentence(policy))}**")
    _take(found)
    _members(policy.behaviour)
    _slots(policy)
    tuning = tuning_of(policy, catalog.tunings)
    _evidence(policy, tuning, _verified(policy, catalog))
    with st.expander("The whole file"):
        _document(policy)


def _choose(found: Sequence[Found[PolicyFile]]) -> Found[PolicyFile]:
    if len(found) == 1:
        return found[0]
    names = [policy.name for policy in found]
    name = st.selectbox("Policy", names, key="policy", bind="query-params")
    return found[names.index(name)] if name in names else found[0]


def in_a_sentence(policy: PolicyFile) -> str:
    """The policy in one sentence."""
    spec, shape = policy.behaviour, policy.shape
    kept = (
        f"Of the {shape.total_experts} experts of {shape.model_id} keep {spec.slots} on the device "
        f"({words.size(spec.slots * shape.expert_bytes)}) with {spec.cache.name}"
    )
    ahead = f"prefetch what {spec.predictor.name} names" if spec.predicts else "prefetch nothing"
    missing = (
        "load what is missing"
        if spec.misses.name == "load"
        else f"answer misses by {spec.misses.name}"
    )
    lossy = "" if spec.is_lossless else " LOSSY: it may change the text."
    return f"{kept}, {ahead}, and {missing} when a layer asks for it.{lossy}"


def tuning_of(policy: PolicyFile, tunings: Sequence[Found[Tuning]]) -> Tuning | None:
    """The tuning that chose a policy: the same trace, budget and slots, and a chosen candidate alike."""
    for found in tunings:
        tuning = found.value
        chosen = next((r for r in tuning.candidates if r.label == tuning.chosen), None)
        if chosen is None:
            continue
        same_name = (
            chosen.label == policy.behaviour.label and chosen.slots == policy.behaviour.slots
        )
        if chosen.policy_hash == policy.behaviour_hash or (
            same_name and tuning.budget == policy.budget
        ):
            return tuning
    return None


def _verified(policy: PolicyFile, catalog: Catalog) -> VerifiedRun | None:
    runs = (run for verdict in catalog.verdicts for run in verdict.value.runs)
    return next((run for run in runs if run.predicted.policy_hash == policy.behaviour_hash), None)


def _take(found: Found[PolicyFile]) -> None:
    path = parts.shell_path(found.path)
    st.caption("Run the model under it, and check that the forecast holds:")
    st.code(
        f"expertflow-trace deploy {path}\nexpertflow-trace verify {path} --out verdict.json",
        language="bash",
        wrap_lines=True,
    )
    st.download_button(
        "Download this policy (JSON)",
        lambda: json.dumps(to_json(found.value), indent=2) + "\n",
        file_name=found.path.name,
        mime="application/json",
        key=f"policy-{found.name}",
        on_click="ignore",
        icon=":material/download:",
    )


def _members(spec: PolicySpec) -> None:
    st.header("What it does")
    rows: list[dict[str, str]] = []
    try:
        lines = predictions.member_lines(spec)
    except ExpertFlowError as error:  # a member of a plugin that is not installed here
        st.warning(words.plain(str(error)))
        return
    for family, member, text in lines:
        rows.append(
            {
                "part": _WORDS.get(family, family),
                "member": words.plain(str(member)),
                "in its own words": words.plain(text.replace("`", "")),
            }
        )
    st.table(pd.DataFrame(rows).set_index("part"))


def _evidence(policy: PolicyFile, tuning: Tuning | None, run: VerifiedRun | None) -> None:
    st.header("The evidence")
    predicted = predicted_of(policy)
    if predicted is None and tuning is None:
        st.info(
            "The file brings no evidence that can be read, and the tuning that chose it is not in this folder."
        )
        return
    if predicted is not None:
        _tiles(predicted, run)
        parts.emulated_note(predicted.link_origin == "emulated")
    if tuning is None:
        return
    st.markdown("\n\n".join(words.plain(line) for line in tuning.explanation))
    parts.chart(
        candidate_figures.speed(tuning.candidates, chosen=tuning.chosen),
        candidate_figures.candidates_frame(tuning.candidates),
        name="policy-candidates",
        alt="Predicted tokens per second of the policies it was chosen from. "
        + ". ".join(candidate_figures.speed_finding(tuning.candidates, tuning.chosen)),
    )
    if tuning.sensitivity:
        parts.chart(
            figures.sensitivity(tuning.sensitivity),
            figures.sensitivity_frame(tuning.sensitivity),
            name="policy-sensitivity",
            alt="The chosen policy and the best one on slightly different machines. "
            + ". ".join(figures.sensitivity_finding(tuning.sensitivity)),
        )


def predicted_of(policy: PolicyFile) -> Result | None:
    """The prediction a policy file carries; None if there is none that can be read."""
    document: Any = policy.evidence.get("predicted")
    if not isinstance(document, Mapping):
        return None
    try:
        return from_json(Result, document)
    except (InputError, TypeError, ValueError):
        return None


def _tiles(predicted: Result, run: VerifiedRun | None) -> None:
    tiles = [
        ("Predicted tokens/s", words.rate(predicted.tokens_per_s), "when it was chosen"),
        (
            "Decode hits, predicted",
            words.percent(predicted.decode.hit_rate),
            f"r = {predicted.slots_ratio:.2f}",
        ),
        (
            "Peak device memory, predicted",
            words.size(predicted.peak_device_bytes),
            f"slots {words.size(predicted.memory.slots)}",
        ),
    ]
    check = next((c for c in run.checks if c.quantity == "tokens_per_s"), None) if run else None
    if check:
        note = f"verify’s forecast was {words.rate(check.predicted)}"
        tiles.append(("Measured tokens/s", words.rate(check.measured), note))
    with st.container(horizontal=True):
        for name, value, note in tiles:
            st.metric(
                name, value, note, delta_color="off", delta_arrow="off", border=True, width=272
            )
    if run is None:
        st.caption("Not verified yet by a verdict in this folder.")


def _slots(policy: PolicyFile) -> None:
    try:
        core = policy.behaviour.build(policy.shape)
    except (ExpertFlowError, TypeError, ValueError) as error:
        st.warning(words.plain(str(error)))
        return
    pools = [(tuple(pool.layers), pool.size) for pool in core.pools]
    parts.chart(
        figures.slots(pools, policy.shape.num_experts),
        figures.slots_frame(pools),
        name="policy-slots",
        alt="Slots by MoE layer. "
        + ". ".join(figures.slots_finding(pools, policy.shape.num_experts)),
    )


def _document(policy: PolicyFile) -> None:
    rows = [{"key": key, "value": value} for key, value in results.flatten(to_json(policy))]
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
