"""Policies as data: policy.json survives the round trip, and nothing else passes for one."""

import json
from dataclasses import replace

import pytest
from expertflow.simulator.policy.checked import random_script, require_replay, tiny_shape
from expertflow.simulator.policy.future import Future
from expertflow.simulator.policy.registry import FAMILIES, caches, predictors
from expertflow.simulator.policy.spec import (
    Member,
    PolicyFile,
    make_spec,
    read_policy,
    write_policy,
)
from expertflow.tracer.errors import PolicyError, UsageError

POPULARITY = [[3, 1, 2, 0] * 2] * 3


def policy_file(**members) -> PolicyFile:
    arguments = {
        "slots": 7,
        "cache": "static",
        "predictor": "gate_lookahead",
        "allocation": "global",
        "popularity": POPULARITY,
        "predictor_params": {"depth": 2, "width": 3},
    }
    spec = make_spec(**(arguments | members))
    return PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=tiny_shape(),
        budget="7slots",
        trace="abc",
        evidence={"explanation": ["because"]},
    )


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "policy.json"
    write_policy(path, policy_file())
    return path


def edit(path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_policy_survives_the_round_trip(written):
    assert read_policy(written) == policy_file()


def test_policy_decides_the_same_after_the_round_trip(written):
    script = random_script(tiny_shape(), 3)

    before = require_replay(policy_file().behaviour, tiny_shape(), script)
    after = require_replay(read_policy(written).behaviour, tiny_shape(), script)

    assert before == after


def test_nothing_is_left_beside_the_file(written):
    assert [path.name for path in written.parent.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["behaviour"].update(slots=8),
        lambda d: d["behaviour"]["cache"].update(name="lru"),
        lambda d: d["behaviour"]["cache"]["params"]["popularity"][0].__setitem__(0, 99),
        lambda d: d["behaviour"]["predictor"]["params"].update(depth=1),
        lambda d: d["behaviour"]["allocation"].update(name="equal"),
        lambda d: d.update(behaviour_hash="0" * 16),
    ],
)
def test_edits_by_hand_are_refused(written, change):
    edit(written, change)

    with pytest.raises(PolicyError, match="changed by hand") as caught:
        read_policy(written)

    assert str(written) in str(caught.value)
    assert "tune" in str(caught.value)


def test_evidence_is_no_behaviour(written):
    edit(written, lambda d: d["evidence"].update(explanation=["other words"]))

    assert read_policy(written).behaviour == policy_file().behaviour


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not readable JSON"),
        ("{", "not readable JSON"),
        ("\x00\x01", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "is not a policy file"),
        ("null", "is not a policy file"),
        ("{}", "format is None"),
        ('{"format": "expertflow.result/1"}', "format is 'expertflow.result/1'"),
        ('{"format": "expertflow.policy/2"}', "expected 'expertflow.policy/1'"),
        ('{"format": "expertflow.policy/1"}', "'behaviour' is missing"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path, text, words):
    path = tmp_path / "policy.json"
    path.write_text(text)

    with pytest.raises(PolicyError) as caught:
        read_policy(path)

    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(b"\xff\xfe\xfa")

    with pytest.raises(PolicyError, match="not readable JSON"):
        read_policy(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.json does not exist"):
        read_policy(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["behaviour"].update(slots="7"), "behaviour.slots: expected int, got '7'"),
        (lambda d: d["behaviour"].update(slots=True), "behaviour.slots: expected int"),
        (lambda d: d["behaviour"].pop("cache"), "'cache' is missing"),
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d["shape"].update(moe_layers=3), "shape.moe_layers: expected a list"),
        (lambda d: d.update(behaviour=[]), "behaviour: expected an object"),
    ],
)
def test_wrong_fields_are_named(written, change, words):
    edit(written, change)

    with pytest.raises(PolicyError) as caught:
        read_policy(written)

    assert words in str(caught.value)
    assert str(written) in str(caught.value)


# --- specs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family.kind, name)
        for family in (caches, predictors)
        for name in family.names()
        if "future" in family.get(name).needs
    ],
)
def test_bounds_are_refused_where_the_future_is_unknown(family, name):
    spec = make_spec(slots=2, **{family: name})

    with pytest.raises(UsageError) as caught:
        spec.build(tiny_shape())

    message = str(caught.value)
    assert f"{family} {name!r} needs to know the future" in message
    assert "cannot be deployed" in message
    assert "expertflow-trace list" in message
    assert spec.build(tiny_shape(), future=Future([])).num_slots == 2


def test_hash_of_policies_that_load_their_misses_is_that_of_before_there_was_a_choice():
    # Recorded with version 0.1.0, which had no such family: policy.json of then must stay readable.
    assert make_spec(slots=4).behaviour_hash() == "f8ccb972fd069474"


def test_answers_to_misses_are_told_what_the_cpu_costs():
    times = {"copy_s": 2.0, "expert_s": 0.5, "token_s": 0.25}

    spec = make_spec(slots=4, misses="sooner", cpu_times=times)

    assert spec.misses.params == times
    assert spec.label == "lru + misses sooner @ 4 slots"
    assert spec.behaviour_hash() != make_spec(slots=4).behaviour_hash()
    assert spec.needs() == {"cpu_times"}
    with pytest.raises(UsageError, match="misses 'sooner' needs times of an expert on the CPU"):
        make_spec(slots=4, misses="sooner")


def test_hash_covers_what_changes_a_decision_and_nothing_else():
    spec = make_spec(slots=4, cache="static", popularity=POPULARITY)

    assert (
        spec.behaviour_hash()
        == make_spec(
            slots=4, cache="static", popularity=tuple(map(tuple, POPULARITY))
        ).behaviour_hash()
    )
    others = [
        spec.with_slots(5),
        replace(spec, cache=Member(name="lru")),
        replace(spec, predictor=Member(name="oracle")),
        replace(spec, allocation=Member(name="global")),
        make_spec(slots=4, cache="static", popularity=[*POPULARITY, [1] * 8]),
    ]
    assert len({s.behaviour_hash() for s in (spec, *others)}) == 6


def test_needs_and_losslessness_are_those_of_all_members():
    spec = make_spec(slots=4, cache="static", predictor="gate_lookahead", popularity=POPULARITY)

    assert spec.needs() == {"popularity", "lookahead"}
    assert spec.is_lossless


def test_labels_name_what_is_not_the_default():
    plain = make_spec(slots=4)
    rich = policy_file().behaviour

    assert plain.label == "lru @ 4 slots"
    assert rich.label == "static + global + gate_lookahead(depth=2, width=3) @ 7 slots"
    assert rich.describe()["cache"] == "static"


def test_policies_from_before_a_family_was_added_are_read(written):
    edit(written, lambda d: d["behaviour"].pop("misses"))

    assert read_policy(written) == policy_file()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_unknown_members_are_refused_when_the_spec_is_made(family):
    with pytest.raises(UsageError, match=f"Unknown {family.kind} 'nonsense'"):
        make_spec(slots=1, **{family.kind: "nonsense"})


def test_popularity_is_asked_for_by_name():
    with pytest.raises(UsageError, match="cache 'static' needs popularity"):
        make_spec(slots=1, cache="static")


def test_impossible_parameters_are_refused_when_it_is_built():
    spec = make_spec(slots=1, predictor="gate_lookahead", predictor_params={"depth": 0})

    with pytest.raises(UsageError, match="depth >= 1"):
        spec.build(tiny_shape())
