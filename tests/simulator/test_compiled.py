"""The compiled engine says what the reference engine says, to the last bit."""

# ruff: noqa: E402

from dataclasses import replace

import pytest

pytest.importorskip("numba")
pytest.register_assert_rewrite("expertflow.simulator.compiled.testing")

import numpy as np
from expertflow.simulator import engines
from expertflow.simulator.compiled.curves import lru_hits, stack_hits
from expertflow.simulator.compiled.replay import has_twin
from expertflow.simulator.compiled.state import KINDS, MISSES
from expertflow.simulator.compiled.tapes import asked, tape_of
from expertflow.simulator.compiled.testing import TwinContract, require_equal
from expertflow.simulator.costs import Linear
from expertflow.simulator.curves import _plain_stack_hits, global_curve, layer_curves
from expertflow.simulator.policy.caches.lru import LRU
from expertflow.simulator.policy.checked import Dice, tiny_lessons, tiny_shape
from expertflow.simulator.policy.registry import allocations, caches, misses, predictors
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.types import MemoryPoint
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_machine, make_steps

TAPED = [name for name in predictors.names() if not hasattr(predictors.get(name), "hear")]
COSTS = ("copy", "mixer", "experts", "wake", "decision", "lookahead", "readback", "head")


def random_run(dice: Dice, **fixed: str):
    """A workload, a policy, a shape and a machine, small enough for every corner to turn up."""
    layers, experts = 1 + dice.below(3), 2 + dice.below(5)
    shape = tiny_shape(layers, experts)
    most = [experts if dice.below(3) == 0 else min(experts, 2) for _ in range(40)]
    steps = [
        [
            dice.some(range(experts), 1 + dice.below(most[(step + layer) % 40]))
            for layer in range(layers)
        ]
        for step in range(1 + dice.below(12))
    ]
    guesses = {
        (step, layer): dice.some(range(experts), dice.below(min(3, experts) + 1))
        for step in range(len(steps))
        for layer in range(layers - 1)
    }
    costs = {
        name: (0.0, 0.3, 1.0, 2.5, 0.1 + dice.below(997) / 997)[dice.below(5)] for name in COSTS
    }
    machine = make_machine(
        **costs, busy=costs["copy"] * (1.0, 1.7)[dice.below(2)], chunks=(1, 3, 8)[dice.below(3)]
    )
    machine = replace(machine, cpu_expert=Linear((0.4, 0.1)), **peaks(layers))
    names = {
        "cache": dice.some(caches.names(), 1)[0],
        "allocation": dice.some(allocations.names(), 1)[0],
        "predictor": dice.some(TAPED, 1)[0],
        "misses": dice.some(misses.names(), 1)[0],
    } | fixed
    lessons = tiny_lessons(shape) | {"cpu_times": machine.cpu_times()}
    spec = make_spec(slots=1 + dice.below(layers * experts), **names, **lessons)
    return (
        spent_before(make_steps(steps, experts=experts, guesses=guesses), dice),
        spec,
        shape,
        machine,
    )


def peaks(layers: int) -> dict[str, object]:
    """Measured peaks of working tensors, of passes in waves too."""
    shares = {(): 140, ((2, 1),) * layers: 132, ((1, 2),) * layers: 180}
    points = (
        MemoryPoint(
            phase=phase,
            batch=1,
            tokens=tokens,
            context=tokens,
            activation_bytes=tokens * size,
            waves=tuple((first * tokens, later * tokens) for first, later in waves),
        )
        for phase in ("prefill", "decode")
        for tokens in (1, 4, 9)
        for waves, size in shares.items()
    )
    sizes = {"gathered_bytes_per_token": 48, "state_bytes": 16, "layer_kv_bytes": 2.5}
    return {"memory": tuple(points), **sizes}


def test_the_machines_of_these_tests_charge_waves_by_their_rows():
    machine = replace(make_machine(), **peaks(3))

    for phase in ("prefill", "decode"):
        assert machine.activations(phase).experts.row > 0


def spent_before(workload, dice: Dice):
    """Now and then something is spent before passes (simulator.regroup)."""
    if dice.below(3):
        return workload
    overhead_s = np.array([(0.0, 0.0, 0.4, 2.3)[dice.below(4)] for _ in range(len(workload.steps))])
    return replace(workload, steps=replace(workload.steps, overhead_s=overhead_s))


class _Twin(TwinContract):
    def random_run(self, dice: Dice):
        return random_run(dice, **{self.family: self.name})


for family, names in (("cache", KINDS), ("misses", MISSES)):
    for name in names:
        title = f"TestTwin_{family}_{name}"
        globals()[title] = type(title, (_Twin,), {"family": family, "name": name})


def test_every_built_in_lossless_member_has_a_twin():
    assert set(KINDS) == set(caches.names())
    assert set(MISSES) == set(misses.names())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_both_engines_agree_on_any_run(seed):
    require_equal(*random_run(Dice(seed)))


class MRU(LRU):
    """Most recently used goes first."""

    name = "mru"

    def victim(self, protected):
        return next((key for key in reversed(self._order) if key not in protected), None)


@pytest.fixture
def mru():
    caches.register("mru", MRU)
    yield
    caches.unregister("mru")


def test_a_third_partys_cache_runs_on_the_reference_engine(mru):
    workload, _, shape, machine = random_run(Dice(1))
    spec = make_spec(slots=2, cache="mru")

    totals, engine = engines.run(workload, spec, shape, machine)

    assert not has_twin(spec)
    assert engine == "reference"
    assert totals.steps.hits.sum() + totals.steps.misses.sum() == len(workload.experts)


def test_built_in_policies_run_on_the_compiled_engine():
    workload, _, shape, machine = random_run(Dice(1))

    assert engines.run(workload, make_spec(slots=2), shape, machine)[1] == "compiled"


def test_without_numba_everything_runs_on_the_reference_engine(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)

    assert engines.engine_for(make_spec(slots=2)) == "reference"


# --- tapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictor", "params"),
    [
        ("oracle", {}),
        ("oracle", {"horizon": 3}),
        ("gate_lookahead", {}),
        ("gate_lookahead", {"width": 1}),
    ],
)
def test_a_tape_by_loops_is_the_tape_by_asking(predictor, params):
    for seed in range(20):
        workload, _, _, _ = random_run(Dice(seed))
        spec = make_spec(slots=2, predictor=predictor, predictor_params=params)

        quick, slow = tape_of(workload, spec), asked(workload, spec)

        assert quick.ptr.tolist() == slow.ptr.tolist()
        assert quick.keys.tolist() == slow.keys.tolist()


def test_tape_of_a_real_trace_counts_votes_of_all_tokens(trace):
    from expertflow.simulator.workload import workload_of

    workload = workload_of(trace)
    spec = make_spec(slots=2, predictor="gate_lookahead", predictor_params={"width": 2})

    quick, slow = tape_of(workload, spec), asked(workload, spec)

    assert len(quick.keys) > 100
    assert quick.ptr.tolist() == slow.ptr.tolist()
    assert quick.keys.tolist() == slow.keys.tolist()


# --- curves --------------------------------------------------------------------------------------


def hits_of(workload, shape, slots: int, allocation: str) -> int:
    spec = make_spec(slots=slots, allocation=allocation)
    totals, _ = engines.run(workload, spec, shape, make_machine())
    return int(totals.steps.hits.sum())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_one_pass_finds_the_hits_of_every_lru(seed):
    workload, _, shape, _ = random_run(Dice(seed))
    floor = int(np.diff(workload.ptr).max())

    shared, apart = global_curve(workload), layer_curves(workload)

    for slots in range(floor, shape.total_experts + 1):
        assert shared[slots] == hits_of(workload, shape, slots, "global")
    for slots in range(floor, shape.num_experts + 1):
        layers = shape.num_moe_layers
        found = sum(curve[slots] for curve in apart)
        assert found == hits_of(workload, shape, slots * layers, "equal")


def test_below_the_largest_event_a_curve_counts_no_hit():
    workload = make_steps([[(0, 1, 2)], [(0, 1, 2)], [(0,)]], experts=4)

    assert global_curve(workload).tolist() == [0, 0, 0, 4, 4]


def test_compiled_stack_distances_are_the_plain_ones_beyond_one_ring():
    dice = Dice(3)
    events = [sorted(dice.some(range(40), 1 + dice.below(6))) for _ in range(2000)]
    sizes = [len(event) for event in events]
    ptr = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    keys = np.asarray([key for event in events for key in event], dtype=np.int32)
    counted = np.arange(len(events)) % 3 > 0

    assert (
        stack_hits(ptr, keys, counted, 40).tolist()
        == _plain_stack_hits(ptr, keys, counted, 40).tolist()
    )


def test_one_lru_alone_finds_what_the_curve_says_of_it():
    for seed in range(40):
        dice = Dice(seed)
        events = [sorted(dice.some(range(70), 1 + dice.below(6))) for _ in range(300)]
        ptr = np.cumsum([0, *map(len, events)]).astype(np.int64)
        keys = np.asarray([key for event in events for key in event], dtype=np.int32)
        counted = np.arange(len(events)) % 4 > 0

        curve = stack_hits(ptr, keys, counted, 70)

        for slots in (6, 7, 30, 64, 70):
            assert lru_hits(ptr, keys, counted, 70, slots) == curve[slots]
