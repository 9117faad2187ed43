"""Routings: Dynamic Expert Sharing against a slow reading of its formulas, and what a policy makes of it."""

import math

import pytest
from expertflow.simulator.policy.base import GateScores
from expertflow.simulator.policy.registry import routings
from expertflow.simulator.policy.spec import Member, make_spec
from expertflow.tracer.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st

logits = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def passes(draw):
    """Logits [tokens, experts] and K."""
    experts = draw(st.integers(2, 9))
    tokens = draw(st.integers(1, 6))
    rows = [draw(st.lists(logits, min_size=experts, max_size=experts)) for _ in range(tokens)]
    return rows, draw(st.integers(1, experts))


def softmax(values):
    shares = [math.exp(value) for value in values]
    return [share / sum(shares) for share in shares]


def top(row, count, allowed):
    return sorted(allowed, key=lambda expert: (-row[expert], expert))[:count]


def said_of(rows, top_k):
    """What the seam hands over for a router with softmax over its K experts (Mixtral)."""
    experts = range(len(rows[0]))
    ids = [top(row, len(row), experts) for row in rows]
    scores = [[row[expert] for expert in order] for row, order in zip(rows, ids, strict=True)]
    return GateScores(ids, scores, [softmax(each[:top_k]) for each in scores], len(rows[0]))


def slowly(rows, top_k, core):
    """S_n = TopK(I_n within C, K); g_n = softmax(I_n over S_n)."""
    ids = [top(row, top_k, core) for row in rows]
    return ids, [
        softmax([row[expert] for expert in chosen]) for row, chosen in zip(rows, ids, strict=True)
    ]


def check(found, wanted):
    ids, weights = wanted
    assert [list(each) for each in found.ids] == ids
    for got, want in zip(found.weights, weights, strict=True):
        assert got == pytest.approx(want)


@given(passes(), st.integers(1, 9))
def test_des_seq_is_what_the_paper_says(drawn, k):
    rows, top_k = drawn
    experts = range(len(rows[0]))
    core = {expert for row in rows for expert in top(row, min(k, top_k), experts)}

    found = routings.build("des_seq", {"k": k}).route(said_of(rows, top_k))

    check(found, slowly(rows, top_k, core))


@given(passes(), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
def test_des_vote_is_what_the_paper_says(drawn, beta):
    rows, top_k = drawn
    experts = range(len(rows[0]))
    votes = dict.fromkeys(experts, 0.0)
    for row in rows:
        own = top(row, top_k, experts)
        for expert, weight in zip(own, softmax([row[e] for e in own]), strict=True):
            votes[expert] += weight
    size = max(1, round(beta * len(rows[0])))
    core = sorted(experts, key=lambda expert: (-votes[expert], expert))[:size]

    found = routings.build("des_vote", {"beta": beta}).route(said_of(rows, top_k))

    check(found, slowly(rows, top_k, core))
    assert len({expert for ids in found.ids for expert in ids}) <= size


@given(passes())
def test_a_token_alone_keeps_its_experts_where_the_core_holds_them_all(drawn):
    rows, top_k = drawn
    said = said_of(rows[:1], top_k)

    for name, params in (("des_seq", {"k": top_k}), ("des_vote", {"beta": 1.0})):
        found = routings.build(name, params).route(said)

        assert list(found.ids[0]) == list(said.chosen(0))
        assert found.weights == said.weights


def test_the_sum_of_weights_is_kept_where_a_router_does_not_normalise():
    said = GateScores([[0, 1, 2], [2, 1, 0]], [[0.0, -1.0, -2.0]] * 2, [[0.3, 0.1]] * 2, 3)

    found = routings.build("des_seq", {"k": 1}).route(said)

    assert [list(ids) for ids in found.ids] == [[0, 2], [2, 0]]
    assert [sum(each) for each in found.weights] == pytest.approx([0.4, 0.4])
    assert found.weights[0][0] / found.weights[0][1] == pytest.approx(math.exp(2))


def test_a_token_none_of_whose_known_experts_is_shared_computes_nothing():
    said = GateScores([[0], [0], [1]], [[0.0]] * 3, [[1.0]] * 3, 4)

    found = routings.build("des_vote", {"beta": 0.25}).route(said)

    assert [list(ids) for ids in found.ids] == [[0], [0], []]
    assert list(found.weights[2]) == []


@pytest.mark.parametrize(
    ("name", "params"),
    [("des_seq", {"k": 0}), ("des_seq", {"k": 1.5}), ("des_vote", {"beta": 0.0}),
     ("des_vote", {"beta": 1.1})],
)  # fmt: skip
def test_impossible_parameters_are_refused(name, params):
    with pytest.raises(UsageError, match=f"routing '{name}' takes"):
        routings.build(name, params)


def test_the_core_has_the_size_that_the_paper_reports():
    for experts, beta, size in ((256, 0.15, 38), (256, 0.10, 26), (64, 0.6, 38), (64, 0.4, 26)):
        said = GateScores(
            [[n] for n in range(experts)], [[0.0]] * experts, [[1.0]] * experts, experts
        )

        found = routings.build("des_vote", {"beta": beta}).route(said)

        assert sum(bool(ids) for ids in found.ids) == size


def test_a_policy_with_it_is_lossy_and_says_so_in_its_name():
    plain, lossy = make_spec(slots=4), make_spec(slots=4, routing="des_vote")
    other = make_spec(slots=4, routing="des_vote", routing_params={"beta": 0.6})

    assert plain.is_lossless
    assert not plain.reroutes
    assert not lossy.is_lossless
    assert lossy.reroutes
    assert "des_vote(beta=0.6)" in other.label
    assert other.describe()["routing"] == "des_vote(beta=0.6)"
    assert len({s.behaviour_hash() for s in (plain, lossy, other)}) == 3


def test_policies_older_than_routings_keep_their_hash():
    spec = make_spec(slots=8, cache="lru")

    assert spec.behaviour_hash() == "02cf124f120e82a5"
    assert spec.members["routing"] == Member(name="as_routed")
