"""Contract of compiled twins, for pytest: the same floats as the reference engine, to the last bit.

Subclass `TwinContract`, name a built-in member of the caches or of the answers to misses, and random runs under every
combination of the others are compared: times, hits, loads, evictions, single copies, outcomes of prefetches.
"""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...tracer.types import ExpertKey, ModelShape
from ..account import LAPS, RunRecord, RunTotals, totals_of
from ..costs import CostModel
from ..engine import simulate
from ..policy.checked import Dice
from ..policy.spec import PolicySpec
from ..workload import Workload
from .replay import has_twin, replay_copies
from .state import Records

_EXACT = (
    "is_decode",
    "events",
    "distinct",
    "hits",
    "lates",
    "misses",
    "bytes_moved",
    "total_s",
    "schedule_s",
)


def require_equal(
    workload: Workload, spec: PolicySpec, shape: ModelShape, costs: CostModel
) -> RunTotals:
    """Run both engines and fail unless all they say is equal. Returns the totals."""
    record = simulate(workload, spec, shape, costs)
    expected = totals_of(record)
    found, copies = replay_copies(workload, spec, shape, costs)
    for name in _EXACT:
        ours, theirs = getattr(found.steps, name), getattr(expected.steps, name)
        assert np.array_equal(ours, theirs), (name, spec.label, ours, theirs)
    for name in LAPS:
        ours, theirs = found.steps.laps_s[name], expected.steps.laps_s[name]
        assert np.array_equal(ours, theirs), (name, spec.label, ours, theirs)
    assert found.prefetch == expected.prefetch, spec.label
    assert found.sequences == expected.sequences, spec.label
    assert found.link_busy_s == expected.link_busy_s, spec.label
    assert found.memory == expected.memory, spec.label
    _require_equal_copies(record, copies, shape.num_experts)
    return found


def _require_equal_copies(record: RunRecord, copies: Records, num_experts: int) -> None:
    def number(key: ExpertKey) -> int:
        return key.layer * num_experts + key.expert if key.layer >= 0 else -1

    loads = [
        (
            number(ExpertKey(entry.layer, entry.expert)),
            number(ExpertKey(entry.evicted_layer, entry.evicted_expert)),
            entry.detail == "prefetch",
        )
        for entry in record.log
        if entry.kind == "load" and entry.detail != "warm"
    ]
    ours = zip(
        copies["key"].tolist(),
        copies["evicts"].tolist(),
        copies["is_prefetch"].astype(bool).tolist(),
        strict=True,
    )
    assert list(ours) == loads
    ended = copies[copies["end_s"] >= 0]
    times = sorted(
        zip(*(ended[n].tolist() for n in ("key", "queued_s", "start_s", "end_s")), strict=True)
    )
    assert times == sorted(
        (number(copy.key), copy.queued_s, copy.start_s, copy.end_s) for copy in record.copies
    )


class TwinContract:
    """See the module docstring. `family` is `cache` or `misses`."""

    family: ClassVar[str]
    name: ClassVar[str]
    runs: ClassVar[int] = 25

    def random_run(self, dice: Dice) -> tuple[Workload, PolicySpec, ModelShape, CostModel]:
        """A small run with the member under test; subclasses say how workloads and machines are made."""
        raise NotImplementedError

    def test_has_a_compiled_twin(self) -> None:
        _, spec, _, _ = self.random_run(Dice(0))

        assert has_twin(spec)

    def test_twin_gives_the_same_run_to_the_last_bit(self) -> None:
        for seed in range(self.runs):
            require_equal(*self.random_run(Dice(seed)))
