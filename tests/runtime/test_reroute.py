"""A lossy routing in the running model: what it computes, what it demands, what is said about the text."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from expertflow.runtime.deploy import text_change
from expertflow.runtime.machine import Machine, generate_all
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import PolicyFile, make_spec, write_policy
from expertflow.simulator.reroute import rerouted
from expertflow.simulator.workload import workload_of
from expertflow.tracer.console import progress
from expertflow.tracer.generate import Generated
from expertflow.tracer.hooks import installed, stock_function
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.prompts import PromptText, tokenize
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run

from tests.models import TEXTS, tiny, write_prompts

CPU = torch.device("cpu")
NEW_TOKENS, BATCH, SLOTS = 4, 4, 9
POLICIES = {
    "seq": {"routing": "des_seq", "routing_params": {"k": 1}},
    "vote": {"routing": "des_vote", "routing_params": {"beta": 0.5}},
    "narrow": {"routing": "des_vote", "routing_params": {"beta": 0.125}},
}


class SlowDes:
    """DES by its formulas on whole tensors, on the resident model: the gate is asked again, experts are stock."""

    def __init__(self, loaded, named, layer):
        self.gate, self.top_k, self.named = layer.gate, loaded.shape.top_k, named
        self.stock = stock_function(layer.module, loaded.implementation)

    def __call__(self, module, hidden_states, top_k_index, top_k_weights):
        scores = torch.log_softmax(self.gate(hidden_states)[0].float(), dim=-1)
        experts = scores.shape[1]
        core = torch.zeros(experts, dtype=torch.bool)
        if self.named["routing"] == "des_seq":
            k = self.named["routing_params"]["k"]
            core[scores.topk(k).indices.flatten()] = True
        else:
            votes = torch.zeros(experts, dtype=torch.float64)
            rounded = top_k_weights.half().double()
            votes.index_add_(0, top_k_index.flatten(), rounded.flatten())
            size = max(1, round(self.named["routing_params"]["beta"] * experts))
            core[votes.topk(size).indices] = True
        allowed = scores.masked_fill(~core, -torch.inf)
        found = allowed.topk(min(self.top_k, int(core.sum())))
        shares = found.values.softmax(dim=-1) * top_k_weights.float().sum(dim=-1, keepdim=True)
        return self.stock(module, hidden_states, found.indices, shares.to(top_k_weights.dtype))


def prompts_of(loaded):
    texts = [PromptText(str(n), "", text) for n, text in enumerate(TEXTS[:4])]
    return tokenize(loaded.tokenizer, texts, 64)


@pytest.fixture(scope="module", params=["olmoe", "mixtral"])
def family(request):
    """A tiny model: the slow references' text under each routing, then a machine to run it on."""
    loaded = load_model(str(tiny(request.param)), device=CPU, dtype="auto")
    prompts = prompts_of(loaded)

    def text(observer=None):
        outputs = generate_all(
            loaded, prompts, batch_size=BATCH, max_new_tokens=NEW_TOKENS, observer=observer
        )
        return [one.token_ids for one in outputs]

    slow = {"resident": text()}
    for name, named in POLICIES.items():
        with installed(loaded.model, loaded.layers, partial(SlowDes, loaded, named)):
            slow[name] = text()
    machine = Machine(loaded, CPU)
    yield machine, prompts, text, slow
    machine.close()


@pytest.mark.parametrize("name", POLICIES)
def test_the_model_computes_what_the_formulas_say(family, name):
    machine, _, text, slow = family
    spec = make_spec(slots=SLOTS, **POLICIES[name])

    with machine.session(spec) as session:
        got = text(session)
        log = session.log
        assert session.routing is not None
        found = session.routing.result()

    assert got == slow[name]
    assert replay(log, spec, machine.loaded.shape).is_exact
    assert found.changed_share > 0
    assert not found.is_approximate
    assert found.distinct_after < found.distinct_before


def test_some_routing_changes_the_text(family):
    slow = family[3]

    assert any(slow[name] != slow["resident"] for name in POLICIES)


@pytest.mark.parametrize(
    ("routing", "params"),
    [("as_routed", {}), ("des_vote", {"beta": 1.0}), ("des_seq", {"k": 8})],
)
def test_a_core_that_holds_everything_keeps_the_text(family, routing, params):
    machine, _, text, slow = family
    spec = make_spec(slots=SLOTS, routing=routing, routing_params=params)

    with machine.session(spec) as session:
        got = text(session)
        assert (session.routing is None) == (routing == "as_routed")
        if session.routing is not None:
            assert session.routing.result().changed_share == 0

    assert got == slow["resident"]


def test_what_is_demanded_is_what_the_tokens_got(family):
    machine, prompts, text, _ = family
    shape = machine.loaded.shape
    size = round(0.5 * shape.num_experts)

    with machine.session(make_spec(slots=SLOTS, **POLICIES["vote"])) as session:
        text(session)
        log = session.log

    events: dict[tuple[int, int], list] = {}
    for entry in log:
        if entry.kind == "event":
            events.setdefault((entry.step, entry.layer), []).append(entry)
    assert all(len(entries) <= size for entries in events.values())
    rows = BATCH * max(len(prompt.token_ids) for prompt in prompts)
    assert sum(entry.tokens for entry in events[0, 0]) == rows * shape.top_k


def test_gates_are_listened_to_only_under_a_routing_and_only_while_it_runs(family):
    machine = family[0]
    gates = [layer.gate for layer in machine.loaded.layers]

    def hooks():
        return sum(len(gate._forward_hooks) for gate in gates)

    with machine.session(make_spec(slots=SLOTS)):
        assert hooks() == 0
    with machine.session(make_spec(slots=SLOTS, **POLICIES["seq"])):
        assert hooks() == len(gates)
    assert hooks() == 0


@pytest.mark.parametrize("predictor", ["gate_lookahead", "previous_token"])
def test_it_goes_with_prediction(family, predictor):
    machine, _, text, slow = family
    spec = make_spec(slots=SLOTS, predictor=predictor, **POLICIES["narrow"])

    with machine.session(spec) as session:
        got = text(session)
        assert replay(session.log, spec, machine.loaded.shape).is_exact

    assert got == slow["narrow"]


def test_the_simulator_agrees_where_nothing_came_before(family, tmp_path):
    """The first layer of the first pass sees the same hidden states under any routing."""
    machine, _, text, _ = family
    request = TraceRequest(
        out=tmp_path / "t",
        model=machine.loaded.shape.model_id,
        prompts=write_prompts(tmp_path / "p.jsonl", TEXTS[:4]),
        batch_size=BATCH,
        max_new_tokens=2,
        residency="resident",
        device="cpu",
        threads=1,
        scores=machine.loaded.shape.num_experts,
    )
    trace_run(request, progress=progress, say=lambda words: None)
    workload = workload_of(Trace.open(request.out))

    for named in POLICIES.values():
        spec = make_spec(slots=SLOTS, **named)
        with machine.session(spec) as session:
            text(session)
            first = [e for e in session.log if e.kind == "event" and (e.step, e.layer) == (0, 0)]
        event = rerouted(workload, spec.routing).event(0)

        live = sorted((entry.expert, entry.tokens) for entry in first)
        assert live == list(zip(event.experts, event.facts.tokens, strict=True))


def test_change_of_text_counts_places_and_lengths():
    one = [Generated(0, [1, 2, 3]), Generated(1, [4, 5])]
    resident = [Generated(1, [4, 5]), Generated(0, [1, 9, 3, 7])]

    found = text_change(one, resident)

    assert (found.sequences, found.sequences_changed) == (2, 1)
    assert (found.tokens, found.tokens_changed) == (6, 2)


def shown(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    return stopped.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def lossy_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lossy")
    loaded = load_model(str(tiny("olmoe")), device=CPU, dtype="auto")
    spec = make_spec(slots=SLOTS, **POLICIES["vote"])
    policy = folder / "policy.json"
    write_policy(
        policy,
        PolicyFile(
            behaviour=spec,
            behaviour_hash=spec.behaviour_hash(),
            shape=loaded.shape,
            budget=f"{SLOTS}slots",
            trace="none",
        ),
    )
    return policy, write_prompts(folder / "p.jsonl", TEXTS[:4])


def options(lossy_policy):
    policy, prompts = lossy_policy
    return (
        policy, "--prompts", prompts, "--batch-size", 4, "--max-new-tokens", 4, "--device", "cpu",
        "--threads", 1,
    )  # fmt: skip


def test_deploy_reports_the_text_instead_of_failing_on_it(lossy_policy, capsys):
    code, said = shown(capsys, "deploy", *options(lossy_policy))

    assert code == 0, said.err
    assert "LOSSY" in said.out
    assert "no promise is made" in said.out

    code, said = shown(capsys, "deploy", *options(lossy_policy), "--json")
    document = json.loads(said.out)
    assert code == 0
    assert document["log_replays"] is True
    assert document["same_tokens"] is False
    assert document["text"]["sequences"] == 4
    assert document["text"]["sequences_changed"] > 0
    assert document["routing"]["is_approximate"] is False
    assert np.isclose(document["routing"]["distinct_after"], distinct_of(document))


def distinct_of(document):
    phases = [document["prefill"], document["decode"]]
    layers = 3
    return sum(p["demanded"] for p in phases) / (layers * sum(p["steps"] for p in phases))


def test_verify_judges_no_lossy_policy_by_its_text(lossy_policy, capsys, monkeypatch):
    """With the policy and the baseline alone: the other configurations are lossless and tested elsewhere."""
    monkeypatch.setattr(
        "expertflow.runtime.verify.configurations",
        lambda spec, workload: [spec, make_spec(slots=spec.slots, cache="none")],
    )
    small = (*options(lossy_policy)[:3], "--device", "cpu", "--threads", 1, "--limit", 2)
    code, said = shown(
        capsys, "verify", *small, "--max-new-tokens", 2, "--repeats", 1, "--json"
    )  # fmt: skip

    verdict = json.loads(said.out)
    lossy, plain = verdict["runs"]
    assert code in (0, 5)  # times on a busy machine may be out of tolerance
    assert (lossy["is_lossless"], plain["is_lossless"]) == (False, True)
    assert lossy["log_replays"]
    assert plain["same_tokens"]
    assert "text differs" not in verdict["summary"]
    assert "is LOSSY" in verdict["summary"]
    assert lossy["predicted"]["routing"]["is_approximate"] is True
    assert "scores of 8 of 8 experts" in lossy["predicted"]["routing"]["scores"]
    assert lossy["measured"][0]["text"]["tokens"] > 0
