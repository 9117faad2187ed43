"""One memory budget: its classes add up, what fits is the most that fits, and refusals say the sums."""

from dataclasses import replace

import pytest
from expertflow.simulator.costs import free_machine
from expertflow.simulator.memory_plan import (
    MemoryNeeds,
    RunSize,
    estimated_needs,
    predictor_file_bytes,
    require_room,
)
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.tracer.errors import InputError, ResourceError
from expertflow.tracer.types import MemoryPoint
from expertflow.tracer.widths import PassWidths
from hypothesis import given
from hypothesis import strategies as st

SHAPE = replace(
    tiny_shape(num_layers=4, num_experts=8, top_k=2),
    hidden_size=16,
    expert_bytes=1000,
    non_expert_bytes=5000,
    kv_bytes_per_token=10,
)
WIDTHS = PassWidths(
    hidden=16, layer=64, expert=40, top_k=2, attended=32, score_heads=0, vocab=50,
    keeps_logits=False, item_bytes=2,
)  # fmt: skip
SIZE = RunSize.of(batch=2, prompt=6, context=10)


def needs(**changes) -> MemoryNeeds:
    fields = {"activations": 300, "staging": 70, "predictor": 20, "reserve": 11}
    return MemoryNeeds(shape=SHAPE, size=SIZE, **(fields | changes))


def test_classes_add_up_to_what_the_device_needs():
    plan = needs().plan(9)

    assert plan.classes == {
        "slots": 9000,
        "non_expert_weights": 5000,
        "kv_cache": 10 * 2 * 10,
        "staging": 70,
        "activations": 300,
        "predictor": 20,
        "reserve": 11,
    }
    assert plan.device_bytes == sum(plan.classes.values())
    assert plan.beside_slots == plan.device_bytes - 9000


def test_rows_are_gathered_only_where_an_event_does_not_fit():
    # 12 tokens demand every expert of a layer: 8 slots per layer hold the event, 7 do not.
    assert needs().plan(32).staging == 0
    assert needs().plan(31).staging == 70
    # 2 tokens demand 4 experts at most.
    few = replace(needs(), size=RunSize.of(batch=2, prompt=1, context=10))
    assert few.plan(16).staging == 0
    assert few.plan(15).staging == 70


def test_the_host_holds_every_expert_and_one_layer_twice_while_loading():
    plan = needs(host_reserve=3).plan(9)

    assert plan.host_experts == 32_000
    assert plan.host_loading == 32_000 + 5000 + 8000
    assert plan.host_bytes == 45_003
    assert needs(on_disk=True).plan(9).host_experts == 0
    assert needs(on_disk=True, streams=True).plan(9).host_loading == 5000 + 3 * 8000
    # On a CPU slots and working tensors lie in the same memory.
    shared = needs(is_host=True).plan(32)
    assert shared.host_bytes == 32_000 + shared.device_bytes


@given(
    budget=st.integers(0, 60_000),
    activations=st.integers(0, 5000),
    staging=st.integers(0, 3000),
    reserve=st.integers(0, 3000),
)
def test_what_fits_is_the_most_that_fits(budget, activations, staging, reserve):
    found = needs(activations=activations, staging=staging, reserve=reserve)

    slots = found.slots_in(budget)

    assert 0 <= slots <= SHAPE.total_experts
    if slots:
        assert found.plan(slots).device_bytes <= budget
    fitting = [n for n in range(1, 33) if found.plan(n).device_bytes <= budget]
    assert slots == max(fitting, default=0)


def test_working_tensors_are_measured_ones_where_a_machine_has_them():
    point = MemoryPoint(phase="prefill", batch=2, tokens=12, context=6, activation_bytes=1234)
    machine = replace(free_machine(SHAPE), memory=(point,), gathered_bytes_per_token=5)

    measured = estimated_needs(SHAPE, SIZE, WIDTHS, measured=machine)
    estimated = estimated_needs(SHAPE, SIZE, WIDTHS)

    assert measured.basis["activations"] == "measured"
    assert measured.activations >= 1234
    assert measured.staging == 12 * 5
    assert estimated.basis["activations"] == "upper estimate from the config"
    assert estimated.activations == WIDTHS.activation_bytes(batch=2, tokens=12, context=10)
    assert estimated.staging == 12 * 2 * 16 * 2
    # A machine without measured peaks tells nothing about them.
    empty = estimated_needs(SHAPE, SIZE, WIDTHS, measured=free_machine(SHAPE))
    assert empty.activations == estimated.activations
    assert empty.basis["activations"] == estimated.basis["activations"]
    assert set(estimated.basis) >= set(estimated.plan(1).classes)


def test_states_of_each_sequence_are_counted_once_whatever_its_length():
    with_states = replace(WIDTHS, kept_per_sequence=7)

    plain, more = (estimated_needs(SHAPE, SIZE, one).plan(1) for one in (WIDTHS, with_states))

    assert more.kv_cache == plain.kv_cache + 2 * 7
    # Where working tensors were measured, states are among them.
    point = MemoryPoint(phase="prefill", batch=2, tokens=12, context=6, activation_bytes=1234)
    machine = replace(free_machine(SHAPE), memory=(point,))
    measured = estimated_needs(SHAPE, SIZE, with_states, measured=machine).plan(1)
    assert measured.kv_cache == plain.kv_cache


def test_how_working_tensors_are_known_is_told():
    class ByPass:
        item_bytes, kept_per_sequence, is_by_pass, is_upper = 2, 0, True, False

        def activation_bytes(self, *, batch, tokens, context, in_parts=False) -> int:
            return 1000 if in_parts else 100

    at_once = estimated_needs(SHAPE, SIZE, ByPass())
    parts = estimated_needs(SHAPE, replace(SIZE, in_parts=True), ByPass())

    assert (at_once.activations, parts.activations) == (100, 1000)
    assert at_once.basis["activations"] == "worked out by passes over shapes"
    assert at_once.basis["staging"] == "upper estimate from the config"


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 512))
def test_the_estimate_grows_with_every_size(batch, prompt, context):
    def at(batch: int, prompt: int, context: int) -> int:
        return WIDTHS.activation_bytes(batch=batch, tokens=batch * prompt, context=context)

    here = at(batch, prompt, context)
    assert here > 0
    assert at(batch + 1, prompt, context) > here
    assert at(batch, prompt + 1, context) > here
    assert at(batch, prompt, context + 1) > here


def test_a_kernel_that_writes_its_scores_is_charged_for_them():
    eager = replace(WIDTHS, score_heads=2)
    sizes = {"batch": 1, "tokens": 100, "context": 100}

    more = eager.activation_bytes(**sizes) - WIDTHS.activation_bytes(**sizes)

    assert more == 2 * 100 * 100 * (2 + 2 + 4)


def test_what_does_not_fit_the_device_is_refused_with_the_sums_and_a_way_out():
    with pytest.raises(ResourceError) as stop:
        require_room(needs(), 20, device="cuda:0", device_bytes=15_000)

    words = str(stop.value)
    assert "20 slots" in words
    assert "25.6 KB on cuda:0" in words
    assert "non expert weights 5 KB" in words
    assert "15 KB may be used" in words
    assert "--budget 9slots" in words


def test_a_device_too_small_for_one_slot_is_told_what_to_make_smaller():
    with pytest.raises(ResourceError, match=r"Not even one slot.*smaller batch"):
        require_room(needs(), 20, device="cuda:0", device_bytes=5000)


def test_a_host_too_small_is_refused_with_the_tier_that_helps():
    # 32 000 of experts while running on the same memory as 20 slots and the rest: above what loading takes.
    with pytest.raises(ResourceError, match="--tier disk"):
        require_room(needs(is_host=True), 20, device="cpu", host_bytes=50_000)
    with pytest.raises(ResourceError, match="number format"):
        require_room(needs(), 1, device="cuda", host_bytes=20_000)


def test_what_fits_is_given_back():
    plan = require_room(needs(), 5, device="cpu", device_bytes=11_000, host_bytes=50_000)

    assert plan.slots == 5


def test_a_folder_that_holds_no_predictor_is_refused(tmp_path):
    assert predictor_file_bytes(None) == 0
    with pytest.raises((InputError, FileNotFoundError)):
        predictor_file_bytes(tmp_path)
