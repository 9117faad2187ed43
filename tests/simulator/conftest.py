"""Builders for the simulator's tests: shapes, machines and workloads with round numbers."""

# ruff: noqa: E402

from collections.abc import Callable, Mapping, Sequence

import pytest

# Before the first import of them, or a failing contract would not show its values.
pytest.register_assert_rewrite(
    "expertflow.simulator.policy.checked", "expertflow.simulator.policy.testing"
)

from expertflow.simulator.costs import CostModel, Linear, PhaseCosts
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.workload import EventDemand, StepDemand, Workload
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ModelShape

Events = Sequence[Sequence[int]]


def _phase_costs(
    mixer: float, experts: float, head: float, decision: float, readback: float, lookahead: float
) -> PhaseCosts:
    return PhaseCosts(
        mixer=Linear((mixer, 0.0, 0.0, 0.0, 0.0)),
        experts=Linear((experts, 0.0, 0.0, 0.0, 0.0, 0.0)),
        head=Linear((head, 0.0, 0.0)),
        decision=Linear((decision, 0.0, 0.0)),
        readback_s=readback,
        lookahead=Linear((lookahead, 0.0, 0.0)),
    )


@pytest.fixture(scope="session")
def machine() -> Callable[..., CostModel]:
    """A machine whose costs are constants per event; everything is free unless given."""

    def build(
        *,
        copy: float = 0.0,
        busy: float | None = None,
        wake: float = 0.0,
        chunks: int = 1,
        mixer: float = 0.0,
        experts: float = 0.0,
        head: float = 0.0,
        decision: float = 0.0,
        readback: float = 0.0,
        lookahead: float = 0.0,
        expert_bytes: int = 1 << 20,
    ) -> CostModel:
        phase = _phase_costs(mixer, experts, head, decision, readback, lookahead)
        return CostModel(
            prefill=phase,
            decode=phase,
            expert_bytes=expert_bytes,
            copy_s=copy,
            busy_copy_s=copy if busy is None else busy,
            wake_s=wake,
            chunk_bytes=expert_bytes // chunks,
            num_experts=1,
        )

    return build


@pytest.fixture(scope="session")
def steps_of() -> Callable[..., Workload]:
    """A workload from experts by step and layer: one sequence, a prefill step, then decode steps.

    `lookahead` gives every event a look-ahead group with the truth of the next layer; `guesses` sets
    the group of an event by (step, layer).
    """

    def build(
        steps: Sequence[Events],
        *,
        experts: int = 8,
        lookahead: bool = False,
        guesses: Mapping[tuple[int, int], Sequence[int]] | None = None,
    ) -> Workload:
        def event(number: int, step: Events, layer: int) -> EventDemand:
            ahead = {1: [list(step[layer + 1])]} if lookahead and layer + 1 < len(step) else {}
            if guesses and (number, layer) in guesses:
                ahead = {1: [list(guesses[number, layer])]}
            return EventDemand(layer, tuple(sorted(step[layer])), ahead)

        return Workload(
            steps=tuple(
                StepDemand(
                    step=number,
                    phase="decode" if number else "prefill",
                    batch=1,
                    tokens=1 if number else 4,
                    context=4 + number,
                    sequences=(0,),
                    events=tuple(event(number, step, layer) for layer in range(len(step))),
                )
                for number, step in enumerate(steps)
            ),
            prompt_tokens={0: 4},
            batch_size=1,
            num_layers=len(steps[0]) if steps else 1,
            num_experts=experts,
            lookahead=int(lookahead or bool(guesses)),
        )

    return build


@pytest.fixture(scope="session")
def shape_of() -> Callable[..., ModelShape]:
    return tiny_shape


@pytest.fixture(scope="session")
def trace(tmp_path_factory):
    """A synthetic trace with look-ahead ids; do not change it."""
    return synthetic_trace(
        tmp_path_factory.mktemp("simulator") / "t", sequences=8, new_tokens=12, prompt_tokens=8
    )
