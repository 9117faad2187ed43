"""A deployment says how it goes: the sums of its session, second by second, and how it ended."""

import pytest
from expertflow.runtime.deploy import RunRequest, deploy
from expertflow.tracer.errors import UsageError
from expertflow.tracer.live import LiveStatus
from expertflow.tracer.records import from_json, read_json

from tests.models import TEXTS, tiny, write_prompts
from tests.runtime.test_images import policy_for


@pytest.fixture
def request_for(tmp_path):
    return RunRequest(
        prompts=write_prompts(tmp_path / "p.jsonl", TEXTS),
        device="cpu",
        max_new_tokens=4,
        batch_size=2,
        live=tmp_path / "d.live.json",
    )


def ended(request) -> LiveStatus:
    assert request.live is not None
    return from_json(LiveStatus, read_json(request.live))


@pytest.mark.parametrize("scheduler", ["fcfs", "route_similarity"])
def test_a_deployment_tells_the_sums_of_its_result(request_for, scheduler):
    policy = policy_for(tiny(), scheduler=scheduler)
    result = deploy(policy, request_for, say=lambda words: None)

    status = ended(request_for)
    assert (status.command, status.state) == ("deploy", "finished")
    assert status.phase == "running under the policy"
    assert status.label == policy.behaviour.label
    assert status.passes >= result.prefill.steps + result.decode.steps
    demanded = result.prefill.demanded + result.decode.demanded
    hits = result.prefill.hits + result.decode.hits
    assert status.hit_rate == pytest.approx(hits / demanded, abs=1e-5)
    moved = result.prefill.bytes_moved + result.decode.bytes_moved
    assert status.bytes_moved == moved
    assert status.stall_share == pytest.approx(result.stall_s / result.time.total_s, rel=0.05)
    assert sum(status.memory.values()) == result.peak_device_bytes


def test_watching_changes_no_decision(request_for, tmp_path):
    policy = policy_for(tiny())
    watched = deploy(policy, request_for, say=lambda words: None)
    alone = deploy(
        policy,
        RunRequest(prompts=request_for.prompts, device="cpu", max_new_tokens=4, batch_size=2),
        say=lambda words: None,
    )

    assert watched.same_tokens
    assert watched.log_replays
    assert (watched.hit_rate, watched.bytes_per_token) == (alone.hit_rate, alone.bytes_per_token)


def test_a_deployment_that_fails_says_why(request_for):
    policy = policy_for(tiny(), predictor="path")

    with pytest.raises(UsageError):
        deploy(policy, request_for, say=lambda words: None)

    status = ended(request_for)
    assert status.state == "failed"
    assert "path predictor" in status.message
