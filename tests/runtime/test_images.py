"""Prompts with images under a policy: the resident model's text, or a refusal in words."""

import json
from dataclasses import replace

import pytest
import torch
from expertflow.runtime.deploy import RunRequest, deploy
from expertflow.runtime.verify import VerifyRequest, verify
from expertflow.simulator.policy.spec import PolicyFile, make_spec
from expertflow.tracer.errors import InputError, UsageError
from expertflow.tracer.load import load_model

from tests.models import tiny
from tests.vision import FAMILIES, folder, picture

pytestmark = pytest.mark.skipif(not FAMILIES, reason="this transformers has no such processor")


def policy_for(model, **choices) -> PolicyFile:
    shape = load_model(str(model), device=torch.device("cpu")).shape
    spec = make_spec(slots=shape.total_experts // 2, **choices)
    return PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=shape,
        budget="0.5",
        trace="",
        evidence={},
    )


@pytest.fixture
def request_for(tmp_path):
    rows = []
    for number, side in enumerate((28, 40, 56)):
        picture(tmp_path / f"{number}.png", side, 56, shade=number)
        rows.append({"text": f"Picture {number}?", "images": [f"{number}.png"]})
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return RunRequest(prompts=path, device="cpu", max_new_tokens=3, batch_size=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deployed_run_shown_images_has_the_residents_text(request_for, family):
    result = deploy(policy_for(folder(family)), request_for, say=lambda words: None)

    assert result.same_tokens
    assert result.log_replays


def test_regrouping_is_refused_for_images(request_for):
    policy = policy_for(folder(FAMILIES[0]), scheduler="route_similarity")

    with pytest.raises(UsageError, match="with images are not regrouped"):
        deploy(policy, request_for, say=lambda words: None)


def test_a_text_only_model_refuses_images_under_a_policy_too(request_for):
    with pytest.raises(InputError, match="reads text only"):
        deploy(policy_for(tiny()), request_for, say=lambda words: None)


def test_verify_judges_on_the_images_themselves(request_for):
    verdict = verify(
        policy_for(folder(FAMILIES[0])),
        VerifyRequest(run=replace(request_for, batch_size=1), repeats=1),
        say=lambda words: None,
        advance=lambda steps: None,
    )

    assert verdict.runs
    assert all(run.same_tokens and run.log_replays for run in verdict.runs)
