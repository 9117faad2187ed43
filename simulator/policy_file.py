"""Policies that name the trace they were judged on, so that nobody verifies them on the prompts they were tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tracer.records import to_json
from ..tracer.store import Trace
from .policy.spec import PolicyFile, PolicySpec


def policy_of(
    spec: PolicySpec, trace: Trace, *, budget: str, evidence: Mapping[str, Any]
) -> PolicyFile:
    """A policy for `policy.json`, with its evidence, the trace's hardware and the hashes of its prompts."""
    hashes = trace.table("sequences", columns=["prompt_sha256"]).to_pydict()["prompt_sha256"]
    return PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=trace.shape,
        budget=budget,
        trace=trace.manifest.trace_id,
        evidence={
            **evidence,
            "hardware": to_json(trace.hardware),
            "prompt_sha256": hashes,
        },
    )
