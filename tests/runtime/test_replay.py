"""Routing replay: recorded choices drive a model with random weights, and everything says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from expertflow.runtime.replay.build import (
    LABEL,
    fill_modules,
    fill_others,
    random_blocks,
    unfilled_model,
)
from expertflow.runtime.replay.live import LiveReplay
from expertflow.runtime.replay.machine import ReplayMachine
from expertflow.runtime.replay.plain import replayed
from expertflow.runtime.replay.plan import passes, plan_replay, replay_workload
from expertflow.runtime.replay.routing import TokenRouting, token_routing
from expertflow.runtime.replay.run import Replay, planned
from expertflow.runtime.replay.shapes import SHAPES, shape_config
from expertflow.runtime.replay.stretch import stretched
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.replay import replay as replay_log
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.arrays import NO_EXPERT
from expertflow.tracer.blocks import BlockLayout
from expertflow.tracer.errors import InputError, UsageError
from expertflow.tracer.generate import greedy
from expertflow.tracer.main import main
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.store import Trace
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.models import FAMILIES, tiny
from tests.runtime.bench import COSTS, CPU, NEW_TOKENS

DEMO = Path(__file__).parents[2] / "traces" / "demo" / "trace"
FLOAT = torch.float32


def made_up(
    *, layers=3, experts=8, top_k=2, lengths=(9, 7, 12), seed=0, weights=True, depths=(1,)
) -> TokenRouting:
    """Routing that nobody recorded: random, but of the right form."""
    draw = np.random.default_rng(seed)
    tokens = sum(lengths)

    def choose():
        scores = draw.random((tokens, layers, experts))
        return scores.argsort(axis=-1)[..., :top_k].astype(np.uint16)

    ahead = {depth: choose() for depth in depths}
    for depth, ids in ahead.items():
        ids[:, layers - depth :] = NO_EXPERT
    return TokenRouting(
        experts=choose(),
        weights=draw.random((tokens, layers, top_k)).astype(np.float32) if weights else None,
        lookahead=ahead,
        first=np.concatenate(([0], np.cumsum(lengths))),
        prompt=np.asarray(lengths) // 2,
        num_experts=experts,
        source="made-up",
    )


def machine_of(family="olmoe", routing=None, limit=None, new_tokens=4) -> ReplayMachine:
    loaded = unfilled_model(shape_config(str(tiny(family))), name=family, dtype=FLOAT)
    shape = loaded.shape
    routing = routing or made_up(
        layers=shape.num_moe_layers, experts=shape.num_experts, top_k=shape.top_k
    )
    plan = planned(loaded, routing, limit=limit, new_tokens=new_tokens, prompt_tokens=None)
    return ReplayMachine(loaded, plan, CPU)


@pytest.fixture(scope="module")
def machine():
    made = machine_of()
    yield made
    made.close()


# --- what was recorded -------------------------------------------------------------------------


def test_a_traces_choices_come_back_token_by_token(bench):
    trace = Trace.open(bench.folder / "trace-4")
    found = token_routing(trace)
    rows = trace.routing_arrays()

    assert len(found.lengths) == len(np.unique(rows.sequence))
    for row in np.flatnonzero(~rows.is_pad)[::7]:
        token = found.first[rows.sequence[row]] + rows.position[row]
        assert found.experts[token, rows.layer[row]].tolist() == rows.experts[row].tolist()
        assert (
            found.lookahead[1][token, rows.layer[row]].tolist() == rows.lookahead[1][row].tolist()
        )
    prompts = trace.table("sequences").to_pydict()["prompt_tokens"]
    assert found.prompt.tolist() == prompts


# --- stretching --------------------------------------------------------------------------------

_ROUTINGS = st.builds(
    made_up,
    layers=st.integers(1, 5),
    experts=st.integers(4, 12),
    top_k=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(_ROUTINGS, st.integers(1, 12), st.integers(8, 40), st.integers(1, 8))
def test_stretched_routing_fits_any_shape(routing, layers, experts, top_k):
    try:
        found = stretched(routing, layers=layers, experts=experts, top_k=top_k)
    except UsageError:
        blocks = -(-top_k // routing.top_k)
        assert experts // blocks < -(-top_k // blocks)
        return
    tokens = len(routing.experts)

    assert found.experts.shape == (tokens, layers, top_k)
    assert found.experts.max() < experts
    # No token chooses an expert twice.
    assert all(len(set(ids)) == top_k for token in found.experts.tolist() for ids in token)
    for ids in found.lookahead.values():
        assert ids.shape == found.experts.shape
        assert ((ids < experts) | (ids == NO_EXPERT)).all()
    again = stretched(routing, layers=layers, experts=experts, top_k=top_k)
    assert np.array_equal(found.experts, again.experts)


def test_routing_of_the_models_own_shape_is_left_as_it_is():
    routing = made_up()

    assert stretched(routing, layers=3, experts=8, top_k=2) is routing


def test_each_block_keeps_the_reuse_of_the_sequence_it_follows():
    routing = made_up(layers=2, experts=8, top_k=2, lengths=(50, 50, 50, 50, 50, 50, 50, 50))
    found = stretched(routing, layers=4, experts=16, top_k=4)

    # Group 1, block 1 is the fourth tile: sequence 3 of the recording stands in for sequence 0.
    block = np.sort(found.experts[:50, 2], axis=1)[:, 2:] - 8
    recorded = np.sort(routing.experts[150:200, 0], axis=1)
    assert np.array_equal(block, recorded)
    assert any("Stretched from 2 layers" in note for note in found.notes)


def test_experts_that_are_never_chosen_are_owned_up_to():
    found = stretched(made_up(experts=8), layers=3, experts=40, top_k=2)

    assert any("32 of 40 experts of each layer are never chosen" in note for note in found.notes)


# --- the plan ----------------------------------------------------------------------------------


def test_prompts_leave_room_for_what_is_generated():
    routing = made_up(lengths=(9, 3, 12))
    plan = plan_replay(routing, limit=None, new_tokens=5, prompt_tokens=4, vocab_size=100)

    assert [len(prompt.token_ids) for prompt in plan.prompts] == [4, 4]  # the second is too short
    assert plan.length.tolist() == [9, 12]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_workload_is_what_a_run_shows_its_observer(machine, batch_size):
    seen = []

    class Watch(SilentObserver):
        def begin_step(self, info, tokens):
            seen.append((info, tokens.sequence, tokens.position))

    prompts = machine.plan.prompts
    spec = make_spec(slots=24)
    with machine.session(spec) as session:

        class Both(Watch):
            def begin_step(self, info, tokens):
                super().begin_step(info, tokens)
                session.begin_step(info, tokens)

            def end_step(self):
                return session.end_step()

        step = 0
        for start in range(0, len(prompts), batch_size):
            greedy(
                machine.loaded.model,
                prompts[start : start + batch_size],
                max_new_tokens=4,
                eos_ids=frozenset(),
                pad_id=0,
                first_step=step,
                observer=Both(),
            )
            step += 4

    foretold = [
        (info, tokens.sequence, tokens.position) for info, tokens in passes(prompts, batch_size, 4)
    ]
    assert seen == foretold


def test_sequences_that_are_too_short_are_refused():
    with pytest.raises(UsageError, match="Ask for fewer --new-tokens"):
        plan_replay(made_up(), limit=None, new_tokens=40, prompt_tokens=None, vocab_size=9)


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_models_from_a_config_have_the_buffers_and_shapes_of_the_librarys_own(family):
    config = shape_config(str(tiny(family)))
    stock = AutoModelForCausalLM.from_config(config, dtype=FLOAT)
    loaded = unfilled_model(config, name=family, dtype=FLOAT)
    fill_modules(loaded, CPU, CPU)

    own = dict(loaded.model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert own[name].shape == parameter.shape
        assert torch.isfinite(own[name]).all()
        assert not own[name].is_meta
    buffers = dict(loaded.model.named_buffers())
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    # Weights differ, and so does every expert of a layer from the next.
    for layer in loaded.layers:
        for weight in (getattr(layer.module, name) for name in layer.weight_names):
            assert len({row.sum().item() for row in weight}) == len(weight)


def test_experts_are_never_in_memory_twice(monkeypatch):
    loaded = unfilled_model(shape_config(str(tiny())), name="olmoe", dtype=FLOAT)
    layout = BlockLayout.of(loaded.layers[0])
    sizes = []
    empty = torch.empty

    def noted(*shape, **more):
        made = empty(*shape, **more)
        if made.device.type != "meta":
            sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "empty", noted)
    blocks = random_blocks(loaded, CPU)
    fill_others(loaded, CPU)

    total = loaded.shape.total_experts * layout.block_bytes
    assert blocks.num_bytes == total
    # Beside the blocks themselves nothing as large as one layer's experts is made.
    assert sorted(sizes)[-1] == total
    assert sum(size > layout.block_bytes * loaded.shape.num_experts for size in sizes) == 1
    assert all(
        getattr(layer.module, name).numel() == 0
        for layer in loaded.layers
        for name in layer.weight_names
    )


def test_every_expert_has_bytes_of_its_own(machine):
    shape = machine.loaded.shape
    blocks = {
        machine.blocks.block(ExpertKey(layer, expert)).numpy().tobytes()
        for layer in range(shape.num_moe_layers)
        for expert in range(shape.num_experts)
    }

    assert len(blocks) == shape.total_experts


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_of_the_size_they_are_named_for(name):
    loaded = unfilled_model(shape_config(name), name=name, dtype=torch.bfloat16)
    total = loaded.shape.total_experts * loaded.shape.expert_bytes + loaded.shape.non_expert_bytes

    billions = {
        "olmoe-1b-7b": 6.9,
        "gpt-oss-20b": 20.9,
        "qwen3-30b-a3b": 30.5,
        "mixtral-8x7b": 46.7,
    }
    assert total / 2e9 == pytest.approx(billions[name], rel=0.02)


# --- replaying ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_runtime_demands_what_was_recorded_in_every_family(family):
    machine = machine_of(family)
    try:
        replay = Replay(machine, batch_size=2)
        spec = make_spec(slots=max(2, machine.loaded.shape.total_experts // 2))
        result, record, _ = replay.run(spec)
        simulated = simulate(replay.workload, spec, machine.loaded.shape, COSTS)
    finally:
        machine.close()

    assert list(record.log) == list(simulated.log)
    assert result.log_replays


@pytest.mark.parametrize(
    ("cache", "predictor", "batch_size"),
    [
        ("none", "none", 1),
        ("lru", "gate_lookahead", 1),
        ("lru", "gate_lookahead", 3),
        ("plec", "previous_token", 2),
    ],
)
def test_policies_give_one_text_and_logs_that_replay(machine, cache, predictor, batch_size):
    replay = Replay(machine, batch_size=batch_size)
    whole, _, first = replay.run(make_spec(slots=24))
    spec = make_spec(slots=9, cache=cache, predictor=predictor)
    result, record, outputs = replay.run(spec)

    assert [one.token_ids for one in outputs] == [one.token_ids for one in first]
    assert result.log_replays
    assert whole.decode.demanded == result.decode.demanded
    assert replay_log(record.log, spec, machine.loaded.shape).is_exact


def test_early_gates_answer_as_recorded():
    layers, experts = 3, 8
    routing = made_up()
    # Perfect look-ahead: what is said early is what is chosen then.
    ahead = np.full_like(routing.experts, NO_EXPERT)
    ahead[:, :-1] = routing.experts[:, 1:]
    routing = TokenRouting(
        experts=routing.experts,
        weights=None,
        lookahead={1: ahead},
        first=routing.first,
        prompt=routing.prompt,
        num_experts=experts,
        source="made-up",
    )
    machine = machine_of(routing=routing)
    try:
        replay = Replay(machine, batch_size=1)
        spec = make_spec(slots=layers * experts // 2, predictor="gate_lookahead")
        result, _, _ = replay.run(spec)
    finally:
        machine.close()

    # Every prefetch names what the next layer asks for, so none is for nothing.
    assert result.prefetch.issued > 0
    assert result.prefetch.wasted == 0
    assert result.accuracy is not None
    assert result.accuracy.precision == pytest.approx(1.0)


def test_results_say_what_they_are(machine):
    replay = Replay(machine, batch_size=1)
    result, _, _ = replay.run(make_spec(slots=12))

    assert LABEL in result.device
    assert LABEL in result.model_id
    assert any("Routing replay, random weights" in words for words in result.warnings)
    assert any("made-up" in words for words in result.provenance.notes)


def test_the_workload_says_what_the_run_will_demand(machine):
    replay = Replay(machine, batch_size=2)
    result, _, _ = replay.run(make_spec(slots=12))
    workload = replay_workload(replay.plan, replay.judged, 2)

    assert len(workload.experts) == result.prefill.demanded + result.decode.demanded


def test_stock_models_follow_the_replay_too():
    from expertflow.runtime.deploy import Prepared
    from expertflow.runtime.stock import stock_runs

    machine = machine_of()
    replay = Replay(machine, batch_size=1)
    _, _, ours = replay.run(make_spec(slots=24))
    machine.close()
    loaded = unfilled_model(shape_config(str(tiny())), name="olmoe", dtype=FLOAT)
    loaded.model.config.initializer_range = 0.3
    fill_modules(loaded, CPU, CPU)
    chosen = []
    experts = loaded.layers[0].module
    experts.register_forward_pre_hook(lambda module, args: None)
    live = LiveReplay(loaded.layers, machine.plan, CPU)
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].tolist()))
    live.is_strict = False
    prepared = Prepared(loaded, CPU, None, "ram", list(replay.judged))
    runs = stock_runs(prepared, batch_size=1, max_new_tokens=4)
    chosen.clear()
    with replayed(runs, live) as under:
        under.run()
    live.close()

    first = replay.plan.first[replay.judged[0].sequence]
    assert (
        chosen[0]
        == replay.plan.routing.experts[first : first + len(replay.judged[0].token_ids), 0].tolist()
    )
    assert len(ours) == len(replay.judged)


# --- what cannot be ----------------------------------------------------------------------------


def test_policies_that_read_the_text_or_the_gates_are_refused(machine):
    with (
        pytest.raises(UsageError, match="goes by the text"),
        machine.session(make_spec(slots=9, predictor="path")),
    ):
        pass
    with (
        pytest.raises(UsageError, match="as_routed"),
        machine.session(make_spec(slots=9, routing="des_seq")),
    ):
        pass


def test_look_ahead_that_was_not_recorded_is_refused():
    machine = machine_of(routing=made_up(depths=()))
    try:
        with (
            pytest.raises(UsageError, match="not recorded in made-up"),
            machine.session(make_spec(slots=9, predictor="gate_lookahead")),
        ):
            pass
    finally:
        machine.close()


def test_a_pass_outside_of_the_replay_is_not_taken_for_one(machine):
    with machine.session(make_spec(slots=24)), pytest.raises(UsageError, match="outside"):
        machine.loaded.model(input_ids=torch.tensor([[1, 2]]))


def test_traces_without_a_whole_token_cannot_be_replayed(bench, monkeypatch):
    trace = Trace.open(bench.folder / "trace-1")
    found = trace.routing_arrays()
    found.position[found.layer == 0] = -1
    monkeypatch.setattr(Trace, "routing_arrays", lambda self: found)

    with pytest.raises(InputError, match="no token whose experts are known in all 3 layers"):
        token_routing(trace)


# --- the command -------------------------------------------------------------------------------


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_the_command_measures_beside_what_it_predicts(bench, tmp_path, capsys):
    out, predicted = tmp_path / "result.json", tmp_path / "predicted.json"
    code = command(
        *("replay", tiny("qwen3_moe"), "--trace", bench.folder / "trace-1", "--budget", "0.5"),
        *("--limit", 4, "--new-tokens", NEW_TOKENS, "--device", "cpu", "--threads", 1),
        *("--link", "200MB/s", "--out", out, "--predicted-out", predicted),
    )
    found = json.loads(out.read_text())
    shown = capsys.readouterr()

    assert code == 0
    assert found["source"] == "measured"
    assert LABEL in found["device"]
    assert found["link_origin"] == "emulated"
    assert json.loads(predicted.read_text())["source"] == "predicted"
    assert "tokens_per_s" in shown.out
    assert "Routing replay, random weights" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("olmoe-1b-7b",), 2, "Give the routing"),
        (("olmoe-1b", "--trace", DEMO), 2, "olmoe-1b-7b"),
        (("olmoe-1b-7b", "--trace", "nowhere"), 3, "nowhere"),
        (("olmoe-1b-7b", "--trace", DEMO, "--new-tokens", "9999"), 2, "fewer --new-tokens"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, code, words, capsys):
    assert command("replay", *arguments) == code
    shown = capsys.readouterr().err
    assert words in " ".join(shown.split())
    assert "Traceback" not in shown
