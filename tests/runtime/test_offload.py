"""offload(): a normal transformers model, with its experts in slots."""

import gc
import json
import sys
import threading
import urllib.request
from dataclasses import replace

import pytest
import torch
from expertflow.runtime import offload
from expertflow.tracer.errors import PolicyError, ResourceError, UsageError
from expertflow.tracer.load import load_model
from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

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


def test_stats_say_where_time_and_memory_went(bench, policy):
    model = offload(str(bench.model), policy, device="cpu", link="1GB/s")
    before = model.expertflow.stats()

    generated(model, do_sample=False)
    after = model.expertflow.stats()

    assert before["passes"] == before["pass_s"] == before["tokens_per_s"] == before["link_Bps"] == 0
    assert after["passes"] == 6
    assert after["tokens"] == 6 * len(batch()["input_ids"])
    assert after["tokens_per_s"] == after["tokens"] / after["pass_s"]
    assert 0 < after["stall_s"] < after["pass_s"]
    assert after["stall_share"] == after["stall_s"] / after["pass_s"]
    assert 0 < after["link_Bps"] <= 1e9  # an emulated link is never faster than it says
    assert after["link_busy_s"] <= after["pass_s"]
    shape = bench.shape
    assert after["weight_bytes"] == shape.non_expert_bytes
    assert after["host_bytes"] == shape.total_experts * shape.expert_bytes
    assert after["predictor_bytes"] == 0
    # Two rows, five tokens of a prompt and five of six generated ones.
    assert after["kv_cache_bytes"] == 2 * 10 * shape.kv_bytes_per_token
    model.expertflow.close()


def test_counters_miss_no_pass_of_a_long_life(bench, policy):
    model = offload(str(bench.model), policy, device="cpu")

    with torch.inference_mode():
        for _ in range(70):
            model(torch.tensor([[60]]))
    stats = model.expertflow.stats()

    assert stats["passes"] == stats["tokens"] == 70
    assert stats["bytes_moved"] == stats["misses"] * bench.shape.expert_bytes
    model.expertflow.close()


def test_a_pass_that_fails_is_not_counted_and_the_next_one_is(bench, policy):
    model = offload(str(bench.model), policy, device="cpu")

    with torch.inference_mode():
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        model(torch.tensor([[60]]))

    assert model.expertflow.stats()["passes"] == 1
    model.expertflow.close()


# --- the library's own ways of using a model -----------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(bench):
    return AutoTokenizer.from_pretrained(bench.model)


def test_pipeline_writes_what_it_writes_with_stock(bench, policy, stock, tokenizer):
    model = offload(str(bench.model), policy, device="cpu")
    texts = ["two cats", "a dog and a bird"]

    ours, theirs = (
        pipeline("text-generation", model=one, tokenizer=tokenizer)(
            texts, max_new_tokens=5, do_sample=False
        )
        for one in (model, stock)
    )

    assert ours == theirs
    assert model.expertflow.stats()["passes"] >= len(texts)
    model.expertflow.close()


def test_text_is_streamed_as_from_stock(bench, policy, stock, tokenizer, capsys):
    model = offload(str(bench.model), policy, device="cpu")
    inputs = tokenizer("two cats", return_tensors="pt")

    shown = []
    for one in (model, stock):
        streamer = TextStreamer(tokenizer)
        one.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
        shown.append(capsys.readouterr().out)

    assert shown[0] == shown[1]
    assert shown[0].startswith("two cats")
    model.expertflow.close()


def test_another_thread_may_generate_while_this_one_reads(bench, policy, stock, tokenizer):
    model = offload(str(bench.model), policy, device="cpu")
    inputs = tokenizer("two cats", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {**inputs, "max_new_tokens": 5, "do_sample": False}

    thread = threading.Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
    thread.start()
    text, seen = "", []
    for piece in streamer:
        text += piece
        seen.append(model.expertflow.stats()["passes"])
    thread.join()

    whole = stock.generate(**arguments)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(whole)
    assert seen == sorted(seen)
    model.expertflow.close()


def test_transformers_serve_answers_from_a_model_put_into_it(bench, policy, stock, tokenizer):
    serving = pytest.importorskip("transformers.cli.serve")
    if not serving.is_serve_available():
        pytest.skip("fastapi is not installed")
    from transformers.cli.serving.model_manager import TimedModel

    model = offload(str(bench.model), policy, device="cpu")
    server = serving.Serve(non_blocking=True, port=0, device="cpu")
    try:
        server._model_manager.loaded_models["mine@main"] = TimedModel(model, -1, tokenizer)
        wanted = {"model": "mine", "prompt": "two cats", "max_tokens": 5, "temperature": 0}
        answer = json.loads(read(f"http://127.0.0.1:{port_of(server)}/v1/completions", wanted))
    finally:
        server.kill_server()

    inputs = tokenizer("two cats", return_tensors="pt")
    whole = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == text
    model.expertflow.close()


def port_of(server) -> int:
    """The port it has found, once it listens."""
    for _ in range(200):
        if server.server.started:
            return server.server.servers[0].sockets[0].getsockname()[1]
        threading.Event().wait(0.05)
    raise AssertionError("the server did not start")


def read(url: str, document=None) -> str:
    body = None if document is None else json.dumps(document).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        return answer.read().decode()


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_say_what_the_stats_say(bench, policy):
    parser = pytest.importorskip("prometheus_client.parser")
    model = offload(str(bench.model), policy, device="cpu")
    generated(model, do_sample=False)

    text, stats = model.expertflow.stats_text(), model.expertflow.stats()

    families = parser.text_string_to_metric_families(text)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert found["expertflow_expert_hits_total",] == stats["hits"]
    assert found["expertflow_link_bytes_total",] == stats["bytes_moved"]
    assert found["expertflow_stall_seconds_total",] == stats["stall_s"]
    assert found["expertflow_memory_bytes", "slot"] == stats["slot_bytes"]
    assert len(found) == 9 + 5
    model.expertflow.close()


def test_metrics_are_served_to_this_machine_until_closed(bench, policy):
    pytest.importorskip("prometheus_client")
    model = offload(str(bench.model), policy, device="cpu")

    port = model.expertflow.serve_metrics(0)
    page = read(f"http://127.0.0.1:{port}/metrics")

    assert "expertflow_passes_total 0.0" in page
    with pytest.raises(UsageError, match="served already"):
        model.expertflow.serve_metrics(0)
    model.expertflow.close()
    with pytest.raises(OSError, match="refused"):
        read(f"http://127.0.0.1:{port}/metrics")


def test_metrics_need_a_library_and_a_free_port(bench, policy, monkeypatch):
    pytest.importorskip("prometheus_client")
    first, second = (offload(str(bench.model), policy, device="cpu") for _ in range(2))
    port = first.expertflow.serve_metrics(0)

    with pytest.raises(ResourceError, match="Choose another port"):
        second.expertflow.serve_metrics(port)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ResourceError, match=r"expertflow-trace\[metrics\]"):
        second.expertflow.stats_text()

    first.expertflow.close()
    second.expertflow.close()


def test_experts_may_wait_on_disk(bench, policy, stock):
    model = offload(str(bench.model), policy, device="cpu", tier="disk")

    assert generated(model, do_sample=False) == generated(stock, do_sample=False)
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
