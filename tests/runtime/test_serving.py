"""Requests served as they arrive on a real model: same text, the simulator's passes and decisions, honest times."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from expertflow.runtime import serving as serving_module
from expertflow.runtime import serving_deploy, serving_pack
from expertflow.runtime.kv_rows import keep_columns
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.serving import Load, ServingLoop, peak_memory, result_of, serve
from expertflow.runtime.serving_calibrate import ServingCalibration, closed_loop
from expertflow.runtime.serving_deploy import requests_of
from expertflow.runtime.serving_pack import Pack, attention_windows
from expertflow.runtime.serving_passes import text_in_passes
from expertflow.simulator.arrivals import Arrival, Arrivals, read_arrivals
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.result import MemoryResult, Result
from expertflow.simulator.serving import Serving, ServingSettings
from expertflow.simulator.serving import serve as simulated
from expertflow.simulator.token_table import Pass, TokenTable
from expertflow.tracer.errors import UsageError
from expertflow.tracer.generate import Generated
from expertflow.tracer.load import load_model
from expertflow.tracer.prompts import PromptText, tokenize
from expertflow.tracer.records import from_json
from expertflow.tracer.schema import WHOLE_STEP
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import TEXTS, tiny
from tests.runtime.bench import COSTS, CPU, NEW_TOKENS
from tests.runtime.test_commands import deployed, one_sentence, ran

NO_MEMORY = MemoryResult(non_expert_weights=0, slots=0, kv_cache=0, activations=0)
STAGGERED = "every:0.004"


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(9))


def load_of(bench, arrivals=STAGGERED, requests=7, tokens=NEW_TOKENS, eos=True, **how) -> Load:
    chosen = ServingSettings(**{"max_batch": 3, "max_step_tokens": 24, **how})
    found = read_arrivals(arrivals, limit=requests)
    load = requests_of(bench.prompts, found, chosen, tokens)
    return replace(load, eos_ids=bench.loaded.eos_ids if eos else frozenset())


def texts_of(served):
    return [one.token_ids for one in served.outputs]


def resident(bench, load):
    alone = bench.resident[1]
    return [alone[number % len(alone)] for number in range(len(load.requests))]


def passes_of(serving: Serving) -> list[Pass]:
    found = []
    while isinstance(one := serving.plan(0.0), Pass):
        found.append(one)
        serving.ended(0.0)
    return found


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [3, 13])
@pytest.mark.parametrize(
    ("arrivals", "how"),
    [
        (STAGGERED, {}),
        ("every:0.0001", {"mixed": False}),
        ("closed:3", {"max_step_tokens": 4}),
        ("closed:3", {"max_batch": 1}),
        ("poisson:200", {"max_step_tokens": 8, "mixed": False}),
    ],
)
def test_text_is_that_of_each_prompt_alone_and_the_log_replays(bench, arrivals, how, slots):
    spec, load = bench.spec(slots), load_of(bench, arrivals, **how)

    served = serve(bench.machine, spec, load, memory=NO_MEMORY)

    assert texts_of(served) == resident(bench, load)
    assert replay(served.record.log, spec, bench.shape).is_exact
    assert len({len(text) for text in texts_of(served)}) > 1, "some end at a mark, others do not"


@pytest.mark.parametrize("predictor", ["gate_lookahead", "previous_token", "token_table"])
def test_prefetches_change_no_text(bench, predictor):
    spec, load = bench.spec(12, predictor=predictor), load_of(bench, "closed:3")

    served = serve(bench.machine, spec, load, memory=NO_MEMORY)

    assert texts_of(served) == resident(bench, load)
    assert any(entry.kind == "predict" for entry in served.record.log)
    assert replay(served.record.log, spec, bench.shape).is_exact


def test_text_would_show_columns_of_the_wrong_sequence(bench, monkeypatch):
    """Else same text would be no proof: what is kept when a sequence leaves is off by one column."""
    monkeypatch.setattr(
        serving_pack,
        "keep_columns",
        lambda cache, columns: keep_columns(cache, (columns - 1).clamp(min=0)),
    )
    load = load_of(bench, "closed:3")

    served = serve(bench.machine, bench.spec(13), load, memory=NO_MEMORY)

    assert texts_of(served) != resident(bench, load)


def test_text_would_show_a_mask_that_lets_sequences_see_each_other(bench, monkeypatch):
    monkeypatch.setattr(Pack, "_mask", lambda self, is_seen: torch.ones_like(is_seen)[None, None])
    load = load_of(bench, "closed:3")

    served = serve(bench.machine, bench.spec(13), load, memory=NO_MEMORY)

    assert texts_of(served) != resident(bench, load)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_families_keep_their_text_sliding_windows_and_all(family):
    changes = {"sliding_window": 8} if family in ("gpt_oss", "mixtral") else {}
    loaded = load_model(str(tiny(family, **changes)), device=CPU)
    texts = [PromptText(str(n), "", text) for n, text in enumerate(TEXTS)]
    prompts = tokenize(loaded.tokenizer, texts, 64)
    alone = generate_all(loaded, prompts, batch_size=1, max_new_tokens=12)
    load = requests_of(
        prompts,
        read_arrivals("closed:3", limit=len(prompts)),
        ServingSettings(max_batch=3, max_step_tokens=16),
        12,
    )
    machine = Machine(loaded, CPU)
    try:
        spec = make_spec(slots=loaded.shape.total_experts // 2)
        served = serve(machine, spec, replace(load, eos_ids=loaded.eos_ids), memory=NO_MEMORY)
    finally:
        machine.close()

    assert texts_of(served) == [one.token_ids for one in alone]


def test_the_resident_model_gives_the_same_text_in_the_same_passes(bench):
    load = load_of(bench, "closed:3", max_step_tokens=9)

    served = serve(bench.machine, bench.spec(9), load, memory=NO_MEMORY)

    stock = load_model(str(bench.model), device=CPU)
    found = text_in_passes(stock, load.requests, served.passes)
    assert [one.token_ids for one in found] == texts_of(served)


# --- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"mixed": False}, {"max_step_tokens": 5}])
def test_a_closed_loop_has_the_simulators_passes_and_decisions(bench, how):
    spec, load = bench.spec(13), load_of(bench, "closed:3", **how)

    served = serve(bench.machine, spec, load, memory=NO_MEMORY)

    table = TokenTable.of(bench.workloads[1])
    ahead = simulated(table, spec, load.arrivals, load.settings).closed_workload()
    steps = served.record.steps
    whole = [n for n, layer in enumerate(steps["layer"]) if layer == WHOLE_STEP]
    for name in ("batch", "tokens", "context"):
        assert [steps[name][n] for n in whole] == getattr(ahead.steps, name).tolist(), name
    assert [steps["phase"][n] == "decode" for n in whole] == ahead.steps.is_decode.tolist()
    assert list(simulate(ahead, spec, bench.shape, COSTS).log) == served.record.log


def test_sequences_join_and_leave_at_every_pass(bench):
    load = load_of(bench, "closed:3")
    found = passes_of(load.serving(bench.spec(13)))

    mixed = [one for one in found if not one.is_decode and len(one.owners) > len(one.members)]

    assert len({frozenset(one.owners) for one in found}) > 4
    assert any(len(set(one.owners)) == 3 for one in mixed)
    assert max(one.batch for one in found) == 3


def test_requests_that_arrive_one_by_one_run_alone_and_the_loop_sleeps(bench, monkeypatch):
    slept = []
    monkeypatch.setattr(serving_module.time, "sleep", slept.append)
    load = load_of(bench, "every:50", requests=3)
    spec = bench.spec(13)
    with bench.machine.session(spec) as session:
        now = iter(np.arange(0.0, 1e4))
        session.timer.now = lambda: float(next(now))
        loop = ServingLoop(bench.loaded, session, load.serving(spec), load)
        outputs = loop.run()

    assert [one.token_ids for one in outputs] == bench.resident[1][:3]
    assert slept
    assert min(slept) > 0
    assert max(loop.kv_positions.values()) <= max(
        len(prompt.token_ids) + NEW_TOKENS for prompt in bench.prompts
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=8),
    ends=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    batch=st.integers(1, 4),
    step=st.integers(4, 12),
    mixed=st.booleans(),
)
def test_an_early_end_leaves_others_all_their_tokens(lengths, ends, batch, step, mixed):
    """Whoever is finished early: nobody is fed twice or past their end, and all leave."""
    serving = Serving(
        TokenTable.of_lengths([p for p, _ in lengths], [d for _, d in lengths]),
        Arrivals(requests=(Arrival(0.0),) * len(lengths), description="", users=batch),
        make_spec(slots=4).build_scheduler(),
        ServingSettings(max_batch=batch, max_step_tokens=step, mixed=mixed),
    )
    fed, got = [0] * len(lengths), [0] * len(lengths)
    while isinstance(found := serving.plan(0.0), Pass):
        assert len(found.owners) <= step
        for number in found.owners:
            fed[number] += 1
        for number in found.members:
            got[number] += 1
            if got[number] > ends[number]:
                serving.finish(number)
        serving.ended(0.0)

    wanted = [min(decodes + 1, ends[n] + 1) for n, (_, decodes) in enumerate(lengths)]
    assert got == wanted
    assert fed == [prompt + tokens - 1 for (prompt, _), tokens in zip(lengths, wanted, strict=True)]
    assert serving.in_progress == ()
    assert serving.waiting == 0


# --- the row that all share ------------------------------------------------------------------------


def test_a_token_sees_its_own_sequence_up_to_itself(bench):
    pack = Pack(bench.loaded.model, CPU)
    pack.add([7, 7, 4], [0, 1, 0])

    mask = pack.add([4, 7, 7], [1, 2, 3])

    assert mask[0, 0].int().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert pack.columns == 6


def test_a_window_hides_what_lies_before_it_and_only_in_its_layers():
    loaded = load_model(str(tiny("gpt_oss", sliding_window=2)), device=CPU)
    pack = Pack(loaded.model, CPU)

    masks = pack.add([0, 0, 0], [0, 1, 2])

    assert attention_windows(loaded.model) == {"full_attention": None, "sliding_attention": 2}
    assert (masks["full_attention"][0, 0] == 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert (masks["sliding_attention"][0, 0] == 0).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 1],
    ]


def test_columns_of_those_who_left_are_dropped_from_every_layer(bench):
    pack = Pack(bench.loaded.model, CPU)
    owners = [1, 2, 1, 3, 2]
    pack.add(owners, [0, 0, 1, 0, 1])
    for layer in range(2):
        keys = torch.tensor(owners, dtype=torch.float)[None, None, :, None] + 10 * layer
        pack.cache.update(keys, -keys, layer)

    pack.keep({1, 3, 9})

    assert pack.columns == 3
    for layer in range(2):
        kept = pack.cache.layers[layer].keys[0, 0, :, 0] - 10 * layer
        assert kept.tolist() == [1, 1, 3]
    pack.keep(())
    assert pack.columns == pack.cache.get_seq_length() == 0


def test_models_whose_sequences_cannot_share_a_row_are_refused(bench, monkeypatch):
    monkeypatch.setattr(serving_pack, "_implementation", lambda model: "flash_attention_2")
    with pytest.raises(UsageError, match=r"flash_attention_2.*Leave --arrivals out"):
        Pack(bench.loaded.model, CPU)
    monkeypatch.undo()
    monkeypatch.setattr(bench.loaded.model.config, "layer_types", ["conv"] * 3, raising=False)
    with pytest.raises(UsageError, match="LinearAttentionLayer, which keep a state"):
        Pack(bench.loaded.model, CPU)


def test_policies_that_cannot_serve_arrivals_are_refused(bench):
    load = load_of(bench)
    for spec in (
        make_spec(slots=8, scheduler="route_similarity"),
        bench.spec(8, predictor="path"),
    ):
        with pytest.raises(UsageError, match=r"leave --arrivals out|Leave --arrivals out"):
            serve(bench.machine, spec, load)


def test_requests_with_images_are_refused(bench):
    shown = replace(bench.prompts[0], inputs={"pixel_values": torch.zeros(1)})
    with pytest.raises(UsageError, match="images"):
        replace(load_of(bench), requests=[shown])


# --- results -------------------------------------------------------------------------------------


def test_times_count_from_arrival_and_tokens_come_in_order(bench):
    load = load_of(bench, requests=6)

    served = serve(bench.machine, bench.spec(13), load, memory=NO_MEMORY)
    result = result_of(bench.machine, bench.spec(13), served, same_tokens=True)

    assert [times.sequence for times in served.record.sequences] == list(range(6))
    for times, output in zip(served.record.sequences, served.outputs, strict=True):
        assert times.is_request
        assert times.token_s[0] > 0
        assert list(times.token_s) == sorted(times.token_s) == output.token_s
        assert len(times.token_s) == len(output.token_ids)
    found = result.arrivals
    assert found.requests == 6
    assert found.offered_per_s == pytest.approx(250)
    assert result.ttft.p50 >= found.queue.p50 >= 0
    assert 0 < found.utilization <= 1
    assert 1 <= found.mean_batch <= 3
    assert result.log_replays
    assert result.batch_size == 3
    assert result.tokens_per_s == pytest.approx(
        sum(len(text) for text in texts_of(served)) / found.span_s
    )
    assert result.bounds.link_tokens_per_s == 0, "idle time is no bound's fault"


def test_a_closed_loop_is_never_idle_and_has_bounds(bench):
    spec = bench.spec(13)
    served = serve(bench.machine, spec, load_of(bench, "closed:2"), memory=NO_MEMORY)

    result = result_of(bench.machine, spec, served)

    assert result.arrivals.finding.startswith("Closed loop: 2 requests in flight")
    assert result.bounds.link_tokens_per_s > 0


def test_memory_is_what_all_sequences_hold_at_once(bench):
    spec, load = bench.spec(13), load_of(bench, "closed:3")

    found = peak_memory(bench.machine, spec, load)
    served = serve(bench.machine, spec, load, memory=found)

    lengths = sorted(len(prompt.token_ids) + NEW_TOKENS - 1 for prompt in load.requests)
    per_token = bench.shape.kv_bytes_per_token
    assert found.slots == 13 * bench.shape.expert_bytes
    assert found.activations > 0
    kept = served.record.memory.kv_cache
    assert lengths[-1] * per_token <= kept <= sum(lengths[-3:]) * per_token


def test_nobody_comes_and_nothing_happens(bench):
    nothing = Load(
        requests=[],
        new_tokens=[],
        arrivals=Arrivals(requests=(), description="none"),
        settings=ServingSettings(max_batch=2),
    )

    served = serve(bench.machine, bench.spec(13), nothing)

    result = result_of(bench.machine, bench.spec(13), served)
    assert served.outputs == []
    assert result.arrivals.finding == "No request arrived."
    assert result.tokens_per_s == 0


def test_lengths_of_arrivals_cut_and_repeat_prompts(bench):
    arrivals = Arrivals(requests=(Arrival(0.0, 3, 2), Arrival(0.1, 400, 1)), description="by hand")
    chosen = ServingSettings(max_batch=2, lengths="arrivals")

    load = requests_of(bench.prompts, arrivals, chosen, 9)

    first, second = bench.prompts[0].token_ids, bench.prompts[1].token_ids
    assert load.requests[0].token_ids == first[:3]
    assert len(load.requests[1].token_ids) == 400
    assert load.requests[1].token_ids[: 2 * len(second)] == second + second
    assert list(load.new_tokens) == [2, 1]
    served = serve(bench.machine, bench.spec(13), load, memory=NO_MEMORY)
    assert [len(text) for text in texts_of(served)] == [2, 1]


def test_calibration_sees_batches_of_every_size_and_mixed_passes(bench):
    chosen = ServingSettings(max_batch=3)
    loads = [closed_loop(bench.prompts, users, 2 * users, 6, chosen) for users in (1, 3)]

    found = [one for load in loads for one in passes_of(load.serving(bench.spec(13)))]
    short = sorted(bench.prompts, key=lambda prompt: len(prompt.token_ids))[:2]
    calibration = ServingCalibration(bench.machine, short, settings=chosen, max_new_tokens=3)
    calibration.specs = calibration.specs[2:4]
    costs = calibration.measure(lambda _: None)

    assert {point.batch for point in costs.memory if point.phase == "decode"} == {1, 2, 3}
    longest = max(len(prompt.token_ids) for prompt in short)
    assert max(point.tokens for point in costs.memory) > longest, "prompts share passes"
    assert {one.batch for one in found if one.is_decode} == {1, 2, 3}
    assert any(not one.is_decode and 0 in one.owners and one.batch == 3 for one in found)
    assert costs.copy_s > 0
    assert costs.decode.mixer.weights[0] + costs.decode.mixer.weights[1] > 0


# --- the command ---------------------------------------------------------------------------------


def test_deploy_serves_arrivals_and_writes_a_result(capsys, bench, policy, tmp_path):
    out = tmp_path / "result.json"

    code, printed, _ = deployed(
        capsys, bench, policy, "--arrivals", "every:0.01", "--max-batch", "2", "--max-step-tokens",
        "16", "--stop-at-eos", "--json", "--out", out,
    )  # fmt: skip

    document = json.loads(printed)
    assert code == 0
    assert document["same_tokens"] is True
    assert document["log_replays"] is True
    assert document["batch_size"] == 2
    assert document["arrivals"]["requests"] == 5
    assert document["arrivals"]["description"] == "one every 0.01 s"
    assert 0 < document["ttft"]["p50"] <= document["ttft"]["p95"] <= document["ttft"]["p99"]
    written = from_json(Result, json.loads(out.read_text()))
    assert written.arrivals is not None
    assert written.source == "measured"


def test_deploy_tells_people_whether_the_machine_keeps_up(capsys, bench, policy):
    code, printed, err = deployed(capsys, bench, policy, "--arrivals", "closed:2", "--requests", 6)

    assert code == 0
    assert "Closed loop: 2 requests in flight" in printed
    assert "same text    yes" in printed
    assert "6/6 requests" in err


@pytest.mark.parametrize("is_rounding", [True, False])
def test_a_text_unlike_the_prompts_alone_must_be_the_residents_in_the_same_passes(
    capsys, bench, policy, monkeypatch, is_rounding
):
    """As with 16 bits, where the batch decides between tokens that are as good as equal."""
    true = serving_deploy.alone

    def changed(*asked):
        found = true(*asked)
        found[0] = replace(found[0], token_ids=[7, *found[0].token_ids[1:]])
        return found

    monkeypatch.setattr(serving_deploy, "alone", changed)
    if not is_rounding:
        monkeypatch.setattr(
            serving_deploy,
            "text_in_passes",
            lambda loaded, requests, passes: changed_text(requests),
        )

    code, printed, err = deployed(capsys, bench, policy, "--arrivals", "closed:2", "--json")

    document = json.loads(printed)
    assert document["same_tokens"] is is_rounding
    assert code == (0 if is_rounding else 5)
    assert ("1 of 5 requests" in " ".join(document["warnings"])) is is_rounding
    assert "the resident model runs the same passes" in err


def changed_text(requests):
    return [Generated(prompt.sequence, [7]) for prompt in requests]


def test_a_queue_serves_every_prompt_at_its_time(capsys, bench, policy, tmp_path):
    queue = tmp_path / "queue.jsonl"
    rows = [{"text": "later", "arrival_s": 5.02}, {"text": "sooner than that", "arrival_s": 5}]
    queue.write_text("".join(json.dumps(row) + "\n" for row in rows))

    code, printed, _ = ran(
        capsys, "deploy", policy, "--prompts", queue, "--arrivals", queue, "--limit", 1,
        "--max-new-tokens", 3, "--device", "cpu", "--json",
    )  # fmt: skip

    document = json.loads(printed)
    assert code == 0
    assert document["same_tokens"] is True
    assert document["arrivals"]["requests"] == 2
    assert document["prefill"]["tokens"] == len("later") + len("sooner than that")
    assert document["arrivals"]["offered_per_s"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--max-batch", 2), 2, "--max-batch is about requests that arrive; add --arrivals"),
        (("--max-step-tokens", 9), 2, "--max-step-tokens is about requests"),
        (("--stop-at-eos",), 2, "--stop-at-eos is about requests"),
        (("--arrivals", "poisson:0"), 2, "needs requests/s above 0"),
        (("--arrivals", "sometimes"), 2, "are not understood"),
        (("--arrivals", "closed:2", "--max-batch", 0), 2, "at least 1, got 0"),
        (("--arrivals", "closed:4", "--max-step-tokens", 3), 2, "only 3 tokens"),
        (("--arrivals", "closed:2", "--prefill", "never"), 2, "--prefill"),
        (("--arrivals", "closed:2", "--requests", 0), 2, "at least 1"),
        (("--arrivals", "every:1", "--lengths", "arrivals"), 2, "say nothing about lengths"),
        (("--arrivals", "missing.jsonl"), 3, "cannot be read"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(
    capsys, bench, policy, options, code, words
):
    got, _, err = deployed(capsys, bench, policy, *options)

    assert got == code
    assert words in one_sentence(err)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a", "arrival_s": "soon"}', "arrival_s is 'soon'; expected seconds"),
        ('{"text": "a", "arrival_s": true}', "arrival_s is True; expected seconds"),
        ('{"text": "a", "arrival_s": NaN}', "arrival_s is nan; expected seconds"),
        ('{"text": "a"}', "has no timestamp, input_length, output_length"),
    ],
)
def test_a_queue_with_a_wrong_time_names_the_line(capsys, policy, tmp_path, line, words):
    queue = tmp_path / "queue.jsonl"
    queue.write_text(f'{{"text": "a", "arrival_s": 0}}\n{line}\n')

    code, _, err = ran(capsys, "deploy", policy, "--prompts", queue, "--arrivals", queue)

    assert code == 3
    assert "line 2" in one_sentence(err)
    assert words in err
