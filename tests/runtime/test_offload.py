"""offload(): a normal transformers model, with its experts in slots."""

import gc
import threading
from dataclasses import replace

import pytest
import torch
from expertflow.runtime import offload
from expertflow.tracer.errors import PolicyError, UsageError
from expertflow.tracer.load import load_model

from tests.runtime.bench import CPU


@pytest.fixture
def policy(bench, tmp_path):
    return bench.policy_file(tmp_path / "policy.json", bench.spec(6))


def batch():
    ids = torch.tensor([[1, 1, 60, 61, 62], [80, 81, 82, 83, 84]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, **more):
    torch.set_num_threads(1)
    return model.generate(**batch(), max_new_tokens=6, pad_token_id=1, **more).tolist()


@pytest.fixture(scope="module")
def stock(bench):
    return load_model(str(bench.model), device=CPU).model


def test_generate_gives_the_stock_models_tokens(bench, policy, stock):
    model = offload(str(bench.model), policy, device="cpu")

    assert generated(model, do_sample=False) == generated(stock, do_sample=False)
    model.expertflow.close()


def test_sampling_and_beams_work_as_in_stock(bench, policy, stock):
    model = offload(str(bench.model), policy, device="cpu")

    for arguments in ({"do_sample": True}, {"do_sample": False, "num_beams": 3}):
        torch.manual_seed(4)
        ours = generated(model, **arguments)
        torch.manual_seed(4)
        assert ours == generated(stock, **arguments)
    model.expertflow.close()


def test_logits_of_a_plain_forward_are_the_stock_models(bench, policy, stock):
    model = offload(str(bench.model), policy, device="cpu")

    with torch.inference_mode():
        assert torch.equal(model(**batch()).logits, stock(**batch()).logits)
        embedded = stock.get_input_embeddings()(batch()["input_ids"])
        ours = model(inputs_embeds=embedded).logits
        assert torch.equal(ours, stock(inputs_embeds=embedded).logits)
    model.expertflow.close()


def test_stats_count_what_was_demanded_and_moved(bench, policy):
    model = offload(str(bench.model), policy, device="cpu", link="1GB/s")
    before = model.expertflow.stats()

    generated(model, do_sample=False)
    after = model.expertflow.stats()
    generated(model, do_sample=False)
    later = model.expertflow.stats()

    assert before["demanded"] == before["bytes_moved"] == before["hit_rate"] == 0
    assert after["hits"] + after["lates"] + after["misses"] == after["demanded"] > 0
    assert after["bytes_moved"] == after["misses"] * bench.shape.expert_bytes
    assert after["hit_rate"] == after["hits"] / after["demanded"]
    assert after["slot_bytes"] == 6 * bench.shape.expert_bytes
    assert later["demanded"] == 2 * after["demanded"]
    model.expertflow.close()


def test_dropping_the_model_stops_its_copy_thread(bench, policy):
    gc.collect()
    before = copy_threads()
    model = offload(str(bench.model), policy, device="cpu")
    during = copy_threads()

    del model
    gc.collect()

    assert during == before + 1
    assert copy_threads() == before


def copy_threads() -> int:
    return sum(thread.name == "expertflow-copies" for thread in threading.enumerate())


def test_policy_of_another_shape_is_refused(bench, tmp_path):
    foreign = replace(bench.shape, num_experts=16)
    path = bench.policy_file(tmp_path / "p.json", bench.spec(6), shape=foreign)

    with pytest.raises(PolicyError, match="num_experts 16"):
        offload(str(bench.model), path, device="cpu")


def test_link_that_is_none_is_refused(bench, policy):
    with pytest.raises(UsageError, match="for example"):
        offload(str(bench.model), policy, device="cpu", link="quick")
