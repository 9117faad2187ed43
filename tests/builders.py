"""Machines with round numbers and workloads from lists, for tests of the simulator."""

from collections.abc import Mapping, Sequence

import numpy as np
from expertflow.simulator.costs import CostModel, Linear, PhaseCosts
from expertflow.simulator.workload import Rows, Steps, Workload, build_workload
from expertflow.tracer.store import NO_EXPERT

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


def make_machine(
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
    cpu: tuple[float, float] = (0.0, 0.0),
    expert_bytes: int = 1 << 20,
) -> CostModel:
    """A machine whose costs are constants per event; everything is free unless given."""
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
        cpu_expert=Linear(cpu),
    )


def make_steps(
    steps: Sequence[Events],
    *,
    experts: int = 8,
    lookahead: bool = False,
    guesses: Mapping[tuple[int, int], Sequence[int]] | None = None,
) -> Workload:
    """A workload from experts by step and layer: one sequence, a prefill step, then decode steps.

    `lookahead` gives every event a look-ahead group with the truth of the next layer; `guesses` sets the group of an
    event by (step, layer).
    """
    layers = len(steps[0]) if steps else 1
    numbers, places, chosen, ahead = [], [], [], []
    for number, step in enumerate(steps):
        for layer, event in enumerate(step):
            guess: Sequence[int] = ()
            if lookahead and layer + 1 < len(step):
                guess = step[layer + 1]
            if guesses and (number, layer) in guesses:
                guess = guesses[number, layer]
            # One token row each, so that a row is as wide as it needs to be: one expert.
            for row in range(max(len(event), len(guess), 1)):
                numbers.append(number)
                places.append(layer)
                chosen.append(sorted(event)[row] if row < len(event) else NO_EXPERT)
                ahead.append(guess[row] if row < len(guess) else NO_EXPERT)
    count = len(steps)
    rows = Rows(
        experts=np.asarray(chosen, dtype=np.uint16)[:, None],
        sequence=np.zeros(len(chosen), dtype=np.int32),
        lookahead={1: np.asarray(ahead, dtype=np.uint16)[:, None]},
    )
    number = np.arange(count)
    return build_workload(
        Steps(
            number=number,
            is_decode=number > 0,
            batch=np.ones(count, dtype=np.int64),
            tokens=np.where(number > 0, 1, 4),
            context=4 + number,
            member_ptr=np.arange(count + 1),
            members=np.zeros(count, dtype=np.int64),
        ),
        np.asarray(numbers, dtype=np.int64),
        np.asarray(places, dtype=np.int64),
        rows,
        prompt_tokens={0: 4},
        batch_size=1,
        num_layers=layers,
        num_experts=experts,
        lookahead=int(lookahead or bool(guesses)),
    )
