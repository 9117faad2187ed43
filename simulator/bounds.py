"""Bounds of a run that has happened, from its own times and its own log."""

from __future__ import annotations

from dataclasses import replace

from ..tracer.types import ModelShape
from .account import RunRecord
from .policy.future import Future
from .policy.replay import events
from .policy.spec import Member, PolicySpec
from .result import Bounds, Result


def clairvoyant(spec: PolicySpec) -> PolicySpec:
    """Belady's cache in a policy's own pools, loading on demand: what the policy is measured against."""
    return replace(
        spec,
        cache=Member(name="belady"),
        predictor=Member(name="none"),
        misses=Member(name="load"),
    )


def measured_bounds(
    result: Result, record: RunRecord, spec: PolicySpec, shape: ModelShape
) -> Bounds:
    """What the measured computation and copies would have allowed.

    all resident: the run without stalls, decisions and predictions. Belady: the clairvoyant cache on the
    same events at the same size, each of its misses at the measured mean copy time, not overlapped (link:
    fully overlapped).
    """
    demanded = [(step, keys) for _, step, keys, _ in events(record.log)]
    core = clairvoyant(spec).build(shape, future=Future([keys for _, keys in demanded]))
    misses = total = 0
    for step, keys in demanded:
        misses += core.demand(step, keys[0].layer, [key.expert for key in keys]).misses
        core.release(step, keys[0].layer)
        total += len(keys)
    seconds = [copy.end_s - copy.start_s for copy in record.copies if copy.why == "demand"]
    loading_s = misses * sum(seconds) / len(seconds) if seconds else 0.0
    time = result.time
    compute_s = time.mixer_s + time.experts_s + time.other_s
    tokens = result.tokens_per_s * time.total_s
    if compute_s <= 0:
        return Bounds()
    best = tokens / max(compute_s, loading_s)
    return Bounds(
        all_resident_tokens_per_s=tokens / compute_s,
        belady_tokens_per_s=tokens / (compute_s + loading_s),
        link_tokens_per_s=best,
        belady_hit_rate=1 - misses / total if total else 0.0,
        share_of_best=result.tokens_per_s / best,
    )
