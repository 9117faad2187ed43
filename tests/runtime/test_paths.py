"""The routing-path predictor: what it learns, what it is judged on, and what it says beside a running model."""

import json
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from expertflow.runtime import offload
from expertflow.runtime.paths.build import PredictorRequest, add_paths, build_predictor
from expertflow.runtime.paths.data import Routed, Split, path_batch, routed, split
from expertflow.runtime.paths.evaluate import (
    baselines,
    decode_tokens,
    merged_scores,
    recall_at,
    scores,
)
from expertflow.runtime.paths.files import load_predictor
from expertflow.runtime.paths.live import LivePaths, PathFollower
from expertflow.runtime.paths.model import PathModel, PathShape
from expertflow.runtime.paths.predict import path_table, ranked_experts
from expertflow.runtime.paths.train import Training, masked_bce, train
from expertflow.runtime.session import Session
from expertflow.simulator.paths import WEIGHTS, read_card
from expertflow.simulator.policy.predictors.path import Path as PathMember
from expertflow.simulator.policy.spec import Member
from expertflow.simulator.workload import workload_of
from expertflow.tracer.console import Silent, no_progress
from expertflow.tracer.errors import InputError, PolicyError, UsageError
from expertflow.tracer.generate import StepTokens
from expertflow.tracer.main import main
from expertflow.tracer.store import NO_EXPERT, Trace
from expertflow.tracer.synthetic import synthetic_trace

from tests.runtime.bench import CPU, NEW_TOKENS, tiny_paths
from tests.runtime.test_offload import batch as two_prompts
from tests.runtime.test_offload import generated

TINY = {"hidden": 8, "feedforward": 16, "blocks": 1}
QUICK = Training(epochs=2, batch_size=4)


def by_rule(sequences=40, prompt=6, new=14, vocab=24, layers=2, experts=8) -> Routed:
    """Tokens at random; the token alone decides its two experts in every layer."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocab, sequences * (prompt + new))
    layer = np.arange(layers)
    one = (tokens[:, None] * 3 + layer) % experts
    two = (one + 1 + (tokens[:, None] + layer) % (experts - 1)) % experts
    first = np.arange(sequences + 1) * (prompt + new)
    return Routed(
        position=np.tile(np.arange(prompt + new), sequences),
        token=tokens,
        experts=np.stack((one, two), axis=-1).astype(np.uint16),
        number=np.arange(sequences),
        first=first,
        decode=first[:-1] + prompt,
        num_experts=experts,
    )


def shape_of(found: Routed, **sizes) -> PathShape:
    return PathShape(
        vocab_size=int(found.token.max()) + 1,
        num_layers=found.num_layers,
        num_experts=found.num_experts,
        top_k=found.top_k,
        **{"hidden": 16, "feedforward": 32, "heads": 2, "head_size": 8, **sizes},
    )


def thirds(found: Routed) -> Split:
    places = np.arange(len(found.number))
    parts = {"train": places[:28], "validation": places[28:32], "held_out": places[32:]}
    return Split((), parts)


@pytest.fixture(scope="module")
def model():
    found = by_rule()
    torch.manual_seed(1)
    made = PathModel(shape_of(found, window=9)).eval()
    for bias in (made.encoder_bias, made.decoder_bias, made.prompt_bias):
        torch.nn.init.normal_(bias.weight)  # they start at zero, where distances do not matter
    return made


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("paths") / "t",
        sequences=20, batch_size=1, layers=2, experts=8, new_tokens=5, prompt_tokens=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor") / "p"
    card = build(trace, folder)
    return folder, card


def build(trace, folder, **changes):
    request = PredictorRequest(
        **{
            "trace": trace.path, "out": folder, "training": QUICK, "network": TINY, "device": "cpu",
            **changes,
        }
    )  # fmt: skip
    return build_predictor(request, progress=no_progress, say=lambda words: None)


# --- learning ----------------------------------------------------------------------------------


def test_learns_experts_that_the_token_decides():
    found = by_rule()
    began = time.perf_counter()

    trained = train(
        found, thirds(found), shape_of(found), Training(epochs=30, batch_size=4), CPU, Silent()
    )

    held = thirds(found).sequences["held_out"]
    tokens = decode_tokens(found, held)
    ranked = ranked_experts(trained.model, found, held, 2)
    assert recall_at(ranked[tokens], found.experts[tokens], 2).mean() > 0.95
    assert trained.course[trained.best].recall == max(epoch.recall for epoch in trained.course)
    assert time.perf_counter() - began < 20


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    found = by_rule(sequences=40)
    weights = [
        train(
            found, thirds(found), shape_of(found), replace(QUICK, seed=seed), CPU, Silent()
        ).model.state_dict()
        for seed in (0, 0, 1)
    ]

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_training_leaves_the_global_random_numbers_alone():
    found = by_rule()
    before = torch.get_rng_state()

    train(found, thirds(found), shape_of(found), replace(QUICK, epochs=1), CPU, Silent())

    assert torch.equal(torch.get_rng_state(), before)


def test_stops_when_validation_no_longer_gets_better():
    found = by_rule()
    # Nothing is left to learn from experts that no token decides.
    found = replace(
        found,
        experts=np.random.default_rng(1).permuted(
            np.broadcast_to(np.arange(8, dtype=np.uint16), (len(found.token), 2, 8)), axis=-1
        )[..., :2],
    )

    trained = train(
        found,
        thirds(found),
        shape_of(found),
        Training(epochs=40, patience=2, batch_size=8),
        CPU,
        Silent(),
    )

    assert trained.stopped == "patience"
    assert len(trained.course) == trained.best + 3 < 40


class Impatient(Silent):
    def __init__(self, steps):
        self.left = steps

    def advance(self, amount=1):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_interrupted_training_keeps_the_best_so_far_if_there_is_one():
    found = by_rule()

    trained = train(found, thirds(found), shape_of(found), QUICK, CPU, Impatient(8))
    assert trained.stopped == "interrupted"
    assert trained.best == 0
    assert not trained.model.training

    with pytest.raises(KeyboardInterrupt):
        train(found, thirds(found), shape_of(found), QUICK, CPU, Impatient(3))


def test_loss_is_the_mean_over_experts_of_known_rows_only():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0]], [[5.0, -5.0, 1.0, 2.0]], [[9.0, 9.0, 9.0, 9.0]]])
    experts = torch.tensor([[[0]], [[0]], [[NO_EXPERT]]])

    total, count = masked_bce(logits, experts).tolist()

    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    second = (softplus(-5) + softplus(-5) + softplus(1) + softplus(2)) / 4
    assert count == 2
    assert total == pytest.approx(np.log(2) + second, rel=1e-5)


# --- the network -------------------------------------------------------------------------------


def test_padding_changes_nothing(model):
    found = by_rule(sequences=3)
    uneven = replace(
        found, first=np.array([0, 20, 33, 60]), decode=np.array([6, 22, 45])
    )  # sequences of different lengths, prompts of 6, 2 and 12 tokens

    together = ranked_experts(model, uneven, np.arange(3), 4, batch_size=3)
    alone = ranked_experts(model, uneven, np.arange(3), 4, batch_size=1)

    assert (together == alone).all()
    # The last prompt is longer than what the model reads: nothing is said of its start.
    assert (together[33:36] == NO_EXPERT).all()
    assert (together[36:] != NO_EXPERT).all()


def test_token_by_token_is_the_same_as_all_at_once(model):
    found = by_rule(sequences=2)
    batch = path_batch(found, [0, 1], model.shape.window)
    with torch.inference_mode():
        _, whole = model(batch.prompt, batch.is_real, batch.fed)
        state = model.start(model.encode(batch.prompt, batch.is_real), batch.is_real)
        steps = [model.logits(model.decode(fed[:, None], state)) for fed in batch.fed.T]

    # Longer than the window, so that what is forgotten is the same too.
    assert batch.fed.shape[1] > model.shape.window
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one(model):
    found = by_rule(sequences=1)
    batch = path_batch(found, [0], model.shape.window)
    changed = batch.fed.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % model.shape.vocab_size
    with torch.inference_mode():
        _, one = model(batch.prompt, batch.is_real, batch.fed)
        _, other = model(batch.prompt, batch.is_real, changed)

    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


def test_knows_where_the_prompt_ends():
    torch.manual_seed(2)
    model = PathModel(shape_of(by_rule())).eval()
    for bias, distance in ((model.encoder_bias, 0), (model.prompt_bias, -1)):
        # This distance only: prompts' tokens attend to themselves, the first token fed to the last of the prompt.
        bias.weight.data.fill_(-1e4)
        bias.weight.data[:, abs(distance)] = 0.0

    def first_logits(prompt):
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            return model(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([[7]]))[1]

    same = first_logits([1, 2, 3, 5])
    assert torch.allclose(same, first_logits([9, 5]), atol=1e-5)
    assert not torch.allclose(same, first_logits([1, 2, 5, 3]), atol=1e-3)


# --- data --------------------------------------------------------------------------------------


def test_tokens_are_read_with_the_experts_of_all_layers(trace):
    found = routed(trace)
    rows = trace.routing_arrays()

    for place in (0, len(found.token) // 2, len(found.token) - 1):
        sequence = found.number[found.sequence_of()[place]]
        mine = (rows.sequence == sequence) & (rows.position == found.position[place]) & ~rows.is_pad
        assert set(rows.token_id[mine]) == {found.token[place]}
        assert set(rows.phase_is_decode[mine]) == {bool(found.is_decode()[place])}
        for layer in range(2):
            [experts] = rows.experts[mine & (rows.layer == layer)]
            assert experts.tolist() == found.experts[place, layer].tolist()


@dataclass
class Prompts:
    """As much of a trace as a split looks at."""

    keys: list[str]
    domains: list[str]
    path: str = "here"

    def table(self, name, columns):
        numbers = range(len(self.keys))
        return pa.table(
            {
                "sequence": list(numbers),
                "prompt_id": [f"p{n}" for n in numbers],
                "domain": self.domains,
                "prompt_sha256": self.keys,
            }
        ).select(columns)


def parts_of(keys, domains, **asked):
    found = by_rule(sequences=len(keys))
    asked = {"hold_out": 0.2, "validation": 0.1, "seed": 0, **asked}
    return split(Prompts(keys, domains), found, **asked)  # pyright: ignore


def test_split_is_by_prompt_whole_and_fair_to_every_domain():
    keys = [f"h{n // 2}" for n in range(120)]  # every prompt was run twice
    domains = ["abc"[n // 2 % 3] for n in range(120)]

    parts = parts_of(keys, domains)

    places = {name: set(found.tolist()) for name, found in parts.sequences.items()}
    assert sorted(n for found in places.values() for n in found) == list(range(120))
    for found in places.values():
        assert {n ^ 1 for n in found} == found
    assert len(parts.prompts) == 60
    held = [prompt.domain for prompt in parts.prompts if prompt.part == "held_out"]
    assert {domain: held.count(domain) for domain in "abc"} == {"a": 4, "b": 4, "c": 4}
    assert len(places["validation"]) == 12


def test_split_follows_its_seed():
    keys, domains = [f"h{n}" for n in range(40)], [""] * 40

    assert parts_of(keys, domains).prompts == parts_of(keys, domains).prompts
    assert parts_of(keys, domains).prompts != parts_of(keys, domains, seed=1).prompts


def test_domain_left_out_is_never_learned_from():
    keys, domains = [f"h{n}" for n in range(40)], ["ab"[n % 2] for n in range(40)]

    parts = parts_of(keys, domains, cross_domain="b")

    assert {p.part for p in parts.prompts if p.domain == "b"} == {"held_out"}
    assert {p.part for p in parts.prompts if p.domain == "a"} == {"train", "validation", "held_out"}


@pytest.mark.parametrize(
    ("count", "asked", "words"),
    [
        (3, {}, "too few"),
        (40, {"hold_out": 0.0}, "--hold-out"),
        (40, {"hold_out": 0.7, "validation": 0.3}, "--validation"),
        (40, {"cross_domain": "poems"}, "this trace has: prose"),
    ],
)
def test_splits_that_leave_nothing_are_refused(count, asked, words):
    with pytest.raises(UsageError, match=words):
        parts_of([f"h{n}" for n in range(count)], ["prose"] * count, **asked)


def test_traces_without_tokens_or_prompts_are_refused_in_a_sentence(trace, monkeypatch):
    rows = trace.routing_arrays()
    for changes, words in (
        ({"token_id": np.full_like(rows.token_id, -1)}, "redacted.*without --redact"),
        ({"phase_is_decode": np.ones_like(rows.phase_is_decode)}, "decode steps only"),
        ({"phase_is_decode": np.zeros_like(rows.phase_is_decode)}, "prompts only"),
    ):
        monkeypatch.setattr(
            Trace, "routing_arrays", lambda self, changes=changes: replace(rows, **changes)
        )
        with pytest.raises(UsageError, match=words):
            routed(trace)


# --- numbers by hand ---------------------------------------------------------------------------


def test_recall_and_precision_by_hand():
    experts = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], dtype=np.uint16)
    ranked = np.array([[[0, 9, 1, 8], [9, 8, 7, 6]], [[5, 4, 0, 1], [0, 1, 2, 6]]], dtype=np.uint16)

    found = scores(ranked, experts, 10)

    assert found["k"] == {"recall": 0.375, "precision": 0.375, "recall_by_layer": [0.75, 0.0]}
    assert found["1.5k"]["recall_by_layer"] == [1.0, 0.0]
    assert found["1.5k"]["precision"] == pytest.approx(0.5 * 2 / 3, abs=1e-4)
    assert found["2k"]["recall_by_layer"] == [1.0, 0.25]
    assert found["2k"]["precision"] == pytest.approx(0.625 / 2, abs=1e-4)


def test_layers_that_were_not_recorded_count_for_nothing():
    experts = np.array([[[0, 1]], [[NO_EXPERT, NO_EXPERT]]], dtype=np.uint16)
    ranked = np.array([[[0, 1, 2, 3]], [[0, 1, 2, 3]]], dtype=np.uint16)

    assert scores(ranked, experts, 8)["k"]["recall"] == 1.0


def pair(experts) -> Routed:
    """Two sequences: one token of prompt, one decode token."""
    return Routed(
        position=np.array([0, 1, 0, 1]),
        token=np.array([3, 4, 5, 6]),
        experts=np.array(experts, dtype=np.uint16)[:, None, :],
        number=np.array([0, 1]),
        first=np.array([0, 2, 4]),
        decode=np.array([1, 3]),
        num_experts=8,
    )


def test_merged_batches_by_hand():
    found = pair([[0, 1], [2, 3], [0, 1], [3, 4]])
    ranked = np.array([[0, 0, 0, 0], [2, 5, 3, 0], [0, 0, 0, 0], [4, 2, 1, 0]])[:, None, :]

    merged = merged_scores(found, ranked.astype(np.uint16), np.arange(2), seed=0)

    assert merged["1"]["batches"] == 2
    assert merged["1"]["k"] == {"recall": 0.5, "precision": 0.5}
    # Together they use {2, 3, 4}; {2, 4, 5} are named.
    assert merged["2"]["batches"] == 1
    assert merged["2"]["distinct"] == 3
    assert merged["2"]["k"]["recall"] == pytest.approx(2 / 3, abs=1e-4)
    assert merged["2"]["k"]["precision"] == pytest.approx(2 / 3, abs=1e-4)
    assert "4" not in merged


def test_simple_predictors_by_hand():
    found = pair([[0, 1], [2, 3], [6, 7], [3, 4]])
    train_on_first = Split((), {"train": np.array([0])})

    simple = baselines(found, train_on_first)

    assert set(simple["previous_token"][3, 0, :2]) == {6, 7}
    assert set(simple["popularity"][3, 0]) == {0, 1, 2, 3}
    assert set(simple["token_table"][1, 0, :2]) == {2, 3}
    # Token 6 was not met in training.
    assert simple["token_table"][3].tolist() == simple["popularity"][3].tolist()


# --- files -------------------------------------------------------------------------------------


def test_saved_and_loaded_it_says_the_same(trace, built):
    folder, card = built
    model, read = load_predictor(folder, CPU)
    found = routed(trace)
    places = np.arange(len(found.number))

    again, _ = load_predictor(folder, CPU)

    assert json.loads(json.dumps(read.metrics)) == json.loads(json.dumps(card.metrics))
    assert (
        ranked_experts(model, found, places, 4) == ranked_experts(again, found, places, 4)
    ).all()
    assert read.shape == trace.shape
    assert read.trace_id == trace.manifest.trace_id


def test_folder_holds_paths_of_held_out_prompts_and_nothing_pickled(trace, built):
    folder, card = built
    [path] = (folder / "paths").iterdir()

    assert sorted(file.name for file in folder.iterdir()) == ["card.json", "paths", WEIGHTS]
    with np.load(path, allow_pickle=False) as file:
        sequences = set(file["sequence"].tolist())
        assert file["experts"].shape[1:] == (2, 4)
    names = {prompt.prompt_id for prompt in card.prompts if prompt.part == "held_out"}
    assert {f"synthetic-{number}" for number in sequences} == names
    assert len(names) == 4


def test_card_says_how_good_it_is_next_to_simple_predictors(built):
    _, card = built
    found = card.metrics["in_domain"]

    assert set(found["baselines"]) == {"previous_token", "token_table", "popularity"}
    for part in (found["decode"], found["prompt"], *found["baselines"].values()):
        assert 0 <= part["k"]["recall"] <= part["1.5k"]["recall"] <= part["2k"]["recall"] <= 1
        assert len(part["2k"]["recall_by_layer"]) == 2
    assert {"1", "2", "4"} <= set(found["merged"])
    assert card.metrics["chance"]["k"] == 0.25
    assert set(card.metrics["by_domain"]) == {"prose", "code"}
    assert [batch for batch, _, _ in card.latency.points] == [1, 8]
    assert all(0 < step < 1 for _, _, step in card.latency.points)


def test_changed_weights_are_refused(trace, tmp_path):
    build(trace, tmp_path / "p")
    with (tmp_path / "p" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")

    with pytest.raises(InputError, match="changed after the card"):
        load_predictor(tmp_path / "p", CPU)


def test_nothing_is_written_over_by_surprise(trace, built, tmp_path):
    folder, _ = built
    with pytest.raises(UsageError, match="--overwrite"):
        build(trace, folder)
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="not a predictor's folder"):
        build(trace, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


def test_domain_left_out_is_judged_apart(trace, tmp_path):
    card = build(trace, tmp_path / "p", cross_domain="code")

    assert card.metrics["cross_domain"]["prompts"] == 10
    assert card.metrics["in_domain"]["prompts"] == 2
    assert card.training["cross_domain"] == "code"


def test_paths_of_another_trace_are_those_of_unseen_prompts(trace, built, tmp_path):
    folder, card = built
    other = synthetic_trace(
        tmp_path / "other", sequences=3, layers=2, experts=8, new_tokens=4, prompt_tokens=5, seed=5
    )

    done = add_paths(other.path, folder, device="cpu")

    assert done["held_out"] == done["sequences"] == 3
    assert done["decode"]["tokens"] == 9
    with pytest.raises(UsageError, match="--overwrite"):
        add_paths(other.path, folder, device="cpu")
    # Of the trace it was trained on, the held-out prompts are all it has not seen.
    again = add_paths(trace.path, folder, device="cpu", overwrite=True)
    assert again["held_out"] == sum(prompt.part == "held_out" for prompt in card.prompts)


def test_paths_of_another_model_are_refused(built, tmp_path):
    folder, _ = built
    other = synthetic_trace(tmp_path / "other", layers=3, experts=8, new_tokens=3, prompt_tokens=3)

    with pytest.raises(PolicyError, match="num_moe_layers"):
        add_paths(other.path, folder, device="cpu")


# --- beside a running model --------------------------------------------------------------------


def paths_of(bench, size):
    """What the bench's predictor says of a recorded run, all at once."""
    found = routed(Trace.open(bench.folder / f"trace-{size}"))
    return path_table(bench.machine.paths, found, np.arange(len(found.number)), 2 * found.top_k)


class Follower:
    """Watches a generation with a predictor, as a session does."""

    def __init__(self, model, most):
        self.follower = PathFollower(model, most)
        self.said = {}

    def begin_step(self, info, tokens):
        paths = self.follower.step(tokens, info.batch)
        for row, place in enumerate(zip(tokens.sequence, tokens.position, strict=True)):
            if place[1] >= 0:
                self.said[place] = paths[row].tolist()
            else:
                assert (paths[row] == NO_EXPERT).all()

    def end_step(self):
        return 0.0


@pytest.mark.parametrize("size", [1, 4])
def test_live_predictions_are_those_made_offline(bench, size):
    from expertflow.runtime.machine import generate_all
    from expertflow.tracer.load import load_model

    table = paths_of(bench, size)
    follower = Follower(bench.machine.paths, 4)
    stock = load_model(str(bench.model), device=CPU)

    generate_all(
        stock, bench.prompts, batch_size=size, max_new_tokens=NEW_TOKENS, observer=follower
    )

    offline = {
        (int(s), int(p)): experts.tolist()
        for s, p, experts in zip(table.sequence, table.position, table.experts, strict=True)
    }
    assert follower.said == offline


@pytest.mark.parametrize("size", [1, 4])
def test_session_prefetches_what_the_simulator_would(bench, size):
    workload = workload_of(Trace.open(bench.folder / f"trace-{size}")).with_paths(
        paths_of(bench, size)
    )
    member = PathMember()
    wanted = defaultdict(list)
    for step, number in workload.walk():
        layer = int(workload.layer[number])
        for key in member.predict(layer, workload.signals(number, 0)):
            wanted[step.step].append(tuple(key))

    run = bench.run(12, "lru", "equal", "path", size)

    found = defaultdict(list)
    for entry in run.log:
        if entry.kind == "predict":
            found[entry.step].append((entry.layer, entry.expert))
    assert found == wanted
    assert run.texts == bench.resident[size]


def test_log_replays_and_its_time_is_in_the_account(bench):
    spec = bench.spec(12, predictor="path")

    record, _ = bench.machine.run(spec, bench.prompts, batch_size=4, max_new_tokens=NEW_TOKENS)
    result = bench.machine.result(record, spec, batch_size=4)

    assert result.log_replays is True
    assert result.memory.predictor == sum(
        p.numel() * p.element_size() for p in bench.machine.paths.parameters()
    )
    columns = record.steps
    first = [
        s for s, layer in zip(columns["lookahead_s"], columns["layer"], strict=True) if layer == 0
    ]
    assert min(first) > 0


def test_policy_that_asks_paths_is_refused_without_a_predictor(bench):
    with pytest.raises(UsageError, match=r"deploy POLICY --paths DIR.*train-predictor"):
        Session(bench.loaded, bench.machine.blocks, bench.spec(8, predictor="path"), CPU)

    assert bench.loaded.model.config._experts_implementation == "grouped_mm"


def test_predictor_of_another_shape_is_refused(bench):
    foreign = tiny_paths(replace(bench.shape, num_experts=16))

    with pytest.raises(UsageError, match="Train one on a trace of this model"):
        Session(
            bench.loaded,
            bench.machine.blocks,
            bench.spec(8, predictor="path"),
            CPU,
            paths=foreign,
        )


def tokens_at(positions, rows=1):
    sequence = [row for row in range(rows) for _ in positions]
    return StepTokens(sequence, list(positions) * rows, [7] * (rows * len(positions)))


def test_what_it_cannot_follow_gets_no_prediction(model):
    follower = PathFollower(model, 4)

    assert follower.step(tokens_at([3]), 1) is None  # never saw the prompt
    assert follower.step(tokens_at(range(3)), 1) is not None
    assert follower.step(tokens_at([3]), 1) is not None
    assert follower.step(tokens_at([5]), 1) is None  # a token was skipped
    assert follower.step(tokens_at([6]), 1) is None
    assert follower.step(tokens_at(range(2), rows=2), 2) is not None  # other prompts
    assert follower.step(tokens_at([2]), 1) is None  # one of them left
    assert follower.step(tokens_at(range(3)), 1) is not None
    assert follower.step(tokens_at(range(3, 5)), 1) is None  # a prompt in chunks


def test_ended_sequences_get_none_while_others_go_on(model):
    follower = PathFollower(model, 4)
    follower.step(tokens_at(range(3), rows=2), 2)

    paths = follower.step(StepTokens([0, 1], [-1, 3], [1, 7]), 2)
    later = follower.step(StepTokens([0, 1], [-1, 4], [1, 7]), 2)

    assert (paths[0] == NO_EXPERT).all()
    assert (paths[1] != NO_EXPERT).all()
    assert (later[1] != NO_EXPERT).all()


def test_signals_hold_the_layers_ahead_and_nothing_before_a_pass(model):
    live = LivePaths(model, 4)
    assert dict(live.ahead(0)) == {}

    live.begin(tokens_at(range(3)), 1)

    assert set(live.ahead(0)) == {1}
    assert [len(group) for group in live.ahead(0)[1]] == [4, 4, 4]
    assert dict(live.ahead(1)) == {}
    live.close()


def test_offloaded_model_predicts_paths_and_gives_the_stock_text(bench, tmp_path):
    from expertflow.tracer.load import load_model

    folder = tmp_path / "predictor"
    made = Trace.open(bench.folder / "trace-1")
    build(made, folder, hold_out=0.3, validation=0.3)
    policy = bench.policy_file(tmp_path / "policy.json", bench.spec(12, predictor="path"))

    model = offload(str(bench.model), policy, device="cpu", paths=folder)

    stock = load_model(str(bench.model), device=CPU).model
    assert generated(model, do_sample=False) == generated(stock, do_sample=False)
    stats = model.expertflow.stats()
    assert stats["bytes_moved"] > stats["misses"] * bench.shape.expert_bytes  # prefetches, too
    assert two_prompts()["attention_mask"][0, 0] == 0  # left-padded
    model.expertflow.close()
    with pytest.raises(UsageError, match="paths=DIR"):
        offload(str(bench.model), policy, device="cpu")


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


SMALL = ("--epochs", 2, "--hidden", 8, "--feedforward", 16, "--device", "cpu")


def test_command_trains_and_the_simulator_replays_what_was_held_out(command, trace, tmp_path):
    out = tmp_path / "p"

    code, printed, _ = command("train-predictor", trace.path, "--out", out, *SMALL, "--json")
    card = json.loads(printed)
    assert code == 0
    assert card["format"] == "expertflow.path_predictor/1"
    assert read_card(out).weights_sha256 == card["weights_sha256"]

    code, printed, _ = command(
        "simulate", trace.path, "--predictor", "path", "--paths", out, "--budget", 0.5, "--json"
    )
    result = json.loads(printed)
    assert code == 0
    assert result["policy"]["predictor"] == "path"
    assert any("4 of 20 prompts" in warning for warning in result["warnings"])


def test_command_says_it_in_a_table(command, trace, tmp_path):
    code, printed, err = command("train-predictor", trace.path, "--out", tmp_path / "p", *SMALL)

    assert code == 0
    for words in (
        "held-out prompts (4)",
        "token table",
        "batches of 4",
        "chance",
        "per decode step",
    ):
        assert words in printed
    assert "held out; on cpu" in err
    assert "--predictor path --paths" in err


def test_command_adds_paths_of_another_trace(command, built, tmp_path):
    folder, _ = built
    other = synthetic_trace(
        tmp_path / "o", sequences=2, layers=2, experts=8, new_tokens=4, prompt_tokens=5, seed=8
    )

    code, printed, _ = command("train-predictor", other.path, "--predict-with", folder)

    assert code == 0
    assert "2 of 2 not seen" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either --out"),
        (("--out", "x", "--predict-with", "y"), "either --out"),
        (("--out", "x", "--epochs", 0), "--epochs 0"),
        (("--out", "x", "--hidden", 0), "--hidden must be at least 1"),
        (("--out", "x", "--lr", "nan"), "--lr nan a number above 0"),
        (("--out", "x", "--cross-domain", "poems"), "this trace has: code, prose"),
    ],
)
def test_impossible_options_are_refused_in_a_sentence(
    command, trace, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)

    code, _, err = command("train-predictor", trace.path, *options)

    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_deploy_takes_the_folder(command, bench, tmp_path):
    folder = tmp_path / "predictor"
    build(Trace.open(bench.folder / "trace-1"), folder, hold_out=0.3, validation=0.3)
    spec = replace(bench.spec(12), predictor=Member(name="path", params={"horizon": 2}))
    policy = bench.policy_file(tmp_path / "policy.json", spec)
    deploy = (
        "deploy", policy, "--prompts", bench.prompts_file, "--max-new-tokens", NEW_TOKENS,
        "--device", "cpu",
    )  # fmt: skip

    code, printed, _ = command(*deploy, "--paths", folder, "--json")
    result = json.loads(printed)
    assert code == 0
    assert result["log_replays"] is True
    assert result["same_tokens"] is True

    code, _, err = command(*deploy)
    assert code == 2
    assert "--paths DIR" in err
