"""The model seam on every tiny family: found, read, recorded, and left as it was."""

import re

import pytest
import torch
from expertflow.tracer.blocks import BlockLayout
from expertflow.tracer.errors import ExpertFlowError, ResourceError, UsageError
from expertflow.tracer.generate import Prompt, greedy
from expertflow.tracer.hooks import (
    IMPLEMENTATION,
    expert_layers,
    gate_choice,
    install,
    installed,
    packed_bytes,
    stock_function,
)
from expertflow.tracer.load import choose_device, choose_dtype, load_model
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.prompts import PromptText
from expertflow.tracer.record import Recorder, Recording, ResidentExperts, record_run
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter

from tests.models import DENSE, FAMILIES, tiny

CPU = torch.device("cpu")
PROMPTS = [Prompt(0, (40, 41, 42, 43, 44)), Prompt(1, (70, 75, 80))]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return load_model(str(tiny(request.param)), device=CPU)


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("hooks") / "t").manifest


def logits(model) -> torch.Tensor:
    ids = torch.arange(20, 60).view(2, 20)
    with torch.inference_mode():
        return model(ids).logits


class Spy:
    """Hands every call on to the stock function and keeps what it saw."""

    def __init__(self, layer):
        self.layer, self.calls = layer, []
        self.stock = stock_function(layer.module, "grouped_mm")

    def __call__(self, module, hidden_states, top_k_index, top_k_weights):
        self.calls.append((hidden_states.clone(), top_k_index.clone()))
        return self.stock(module, hidden_states, top_k_index, top_k_weights)


def test_every_moe_layer_is_found_with_its_gate_and_weights(loaded):
    config, layers = loaded.model.config, loaded.layers
    dense = getattr(config, "first_k_dense_replace", 0)

    assert [layer.index for layer in layers] == list(range(config.num_hidden_layers - dense))
    assert [layer.decoder_layer for layer in layers] == list(range(dense, config.num_hidden_layers))
    for layer in layers:
        assert layer.gate is not None
        assert {"gate_up_proj", "down_proj"} <= set(layer.weight_names)
        stacked = dict(layer.module.named_parameters(recurse=False))
        assert set(layer.weight_names) == set(stacked)


def test_shape_agrees_with_the_modules(loaded):
    shape, model, first = loaded.shape, loaded.model, loaded.layers[0]
    experts = sum(
        getattr(layer.module, name).nbytes for layer in loaded.layers for name in layer.weight_names
    )
    everything = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

    assert shape.architecture == type(model).__name__
    assert shape.dtype == "float32"
    assert shape.num_experts == getattr(first.module, first.weight_names[0]).shape[0]
    assert shape.non_expert_bytes == everything - experts
    assert shape.total_experts * shape.expert_bytes >= experts
    assert shape.expert_bytes == packed_bytes(first) == BlockLayout.of(first).block_bytes
    assert (shape.hidden_size, shape.vocab_size) == (32, 258)


def test_kv_bytes_are_those_of_the_librarys_cache(loaded):
    with torch.inference_mode():
        cache = loaded.model(torch.arange(30, 40)[None], use_cache=True).past_key_values

    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert loaded.shape.kv_bytes_per_token == held / 10


def test_recording_leaves_the_logits_bit_identical(loaded):
    before = logits(loaded.model)
    recorder = Recorder(loaded, None, CPU, Recording())
    seen = []

    class Watched(ResidentExperts):
        def __call__(self, *args):
            seen.append(args[2])
            return super().__call__(*args)

    with installed(loaded.model, loaded.layers, lambda layer: Watched(recorder, layer)):
        greedy_like = logits_under(recorder, loaded.model)

    assert len(seen) == len(loaded.layers)
    assert torch.equal(greedy_like, before)


def logits_under(recorder, model) -> torch.Tensor:
    from expertflow.tracer.generate import StepTokens
    from expertflow.tracer.timing import StepInfo

    info = StepInfo(step=0, phase="prefill", batch=2, tokens=40, context=20)
    recorder.begin_step(info, StepTokens([0] * 40, list(range(40)), [0] * 40))
    result = logits(model)
    recorder.end_step()
    return result


def test_recorded_ids_are_the_top_k_of_the_gates_own_logits(loaded, hardware, tmp_path):
    states: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in loaded.layers}
    hooks = [
        layer.gate.register_forward_pre_hook(
            lambda module, args, place=layer.index: states[place].append(
                args[0].reshape(-1, 32).clone()
            )
        )
        for layer in loaded.layers
    ]

    path = record(loaded, hardware, tmp_path / "t", Recording(lookahead=0))
    for hook in hooks:
        hook.remove()

    routing = Trace.open(path).routing_arrays()
    for layer in loaded.layers:
        recorded = torch.from_numpy(routing.experts[routing.layer == layer.index].astype("int64"))
        expected = recomputed(loaded, layer.gate, torch.cat(states[layer.index]))
        assert torch.equal(recorded.sort(dim=1).values, expected.sort(dim=1).values)


def record(loaded, manifest, out, recording):
    """Trace two prompts as one batch."""
    with TraceWriter(
        out,
        shape=loaded.shape,
        hardware=manifest.hardware,
        run=manifest.run,
        provenance=manifest.provenance,
        recorded=(
            "routing",
            "steps",
            "weights",
            "token_ids",
            *(f"lookahead_{depth}" for depth in range(1, recording.lookahead + 1)),
        ),
    ) as writer:
        recorder = Recorder(loaded, writer, CPU, recording)
        record_run(
            recorder,
            PROMPTS,
            [PromptText(str(p.sequence), "", "text") for p in PROMPTS],
            batch_size=2,
            max_new_tokens=4,
            make=lambda layer: ResidentExperts(recorder, layer),
            advance=lambda tokens: None,
        )
        recorder.write()
    return out


def recomputed(loaded, gate, states: torch.Tensor) -> torch.Tensor:
    """Top-k from the gate's weights alone, as each family's paper says."""
    router = getattr(gate, "layer", gate)
    scores = states @ router.weight.T
    bias = getattr(router, "bias", None)
    if bias is not None:
        scores = scores + bias
    top_k = loaded.shape.top_k
    if loaded.model.config.model_type != "deepseek_v3":
        return scores.topk(top_k, dim=1).indices
    # Group-limited: the groups with the two best experts each, then the best experts inside.
    grouped = scores.sigmoid().view(len(states), gate.num_group, -1)
    best = grouped.topk(2, dim=2).values.sum(dim=2).topk(gate.topk_group, dim=1).indices
    is_open = torch.zeros(len(states), gate.num_group, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~is_open[:, :, None], -1.0).flatten(1).topk(top_k, dim=1).indices


def test_lookahead_ids_are_the_next_gates_choice_for_this_state(hardware, tmp_path):
    loaded = load_model(str(tiny()), device=CPU)
    spies: dict[int, Spy] = {}

    def make(layer):
        spies[layer.index] = Spy(layer)
        return spies[layer.index]

    with installed(loaded.model, loaded.layers, make):
        greedy(
            loaded.model,
            PROMPTS,
            max_new_tokens=4,
            eos_ids=loaded.eos_ids,
            pad_id=loaded.pad_id,
            first_step=0,
            observer=SilentObserver(),
        )
    path = record(loaded, hardware, tmp_path / "t", Recording(lookahead=2))

    routing = Trace.open(path).routing_arrays()
    for here, depth in ((0, 1), (0, 2), (1, 1)):
        states = torch.cat([states for states, _ in spies[here].calls])
        scores = states @ loaded.layers[here + depth].gate.weight.T
        recorded = routing.lookahead[depth][routing.layer == here].astype("int64")
        assert torch.equal(torch.from_numpy(recorded), scores.topk(2, dim=1).indices)


def test_gate_choice_agrees_with_what_the_layer_itself_uses(loaded):
    spies = []

    def make(layer):
        spies.append(Spy(layer))
        return spies[-1]

    with installed(loaded.model, loaded.layers, make):
        logits(loaded.model)

    for spy in spies:
        [(states, chosen)] = spy.calls
        with torch.inference_mode():
            again = gate_choice(spy.layer.gate, states, loaded.shape.top_k)
        assert torch.equal(again.sort(dim=1).values, chosen.sort(dim=1).values)


def test_install_and_restore_give_the_model_back_as_it_was(loaded):
    before = logits(loaded.model)
    implementation = loaded.model.config._experts_implementation
    attributes = [set(vars(layer.module)) for layer in loaded.layers]

    restore = install(loaded.model, loaded.layers, Spy)
    during = loaded.model.config._experts_implementation
    restore()
    restore()

    assert during == IMPLEMENTATION
    assert loaded.model.config._experts_implementation == implementation
    assert [set(vars(layer.module)) for layer in loaded.layers] == attributes
    assert torch.equal(logits(loaded.model), before)


def test_a_failure_inside_still_gives_the_model_back():
    loaded = load_model(str(tiny()), device=CPU)

    def broken(module, hidden_states, top_k_index, top_k_weights):
        raise RuntimeError("handler failed")

    with (
        pytest.raises(RuntimeError, match="handler failed"),
        installed(loaded.model, loaded.layers, lambda layer: broken),
    ):
        logits(loaded.model)

    assert loaded.model.config._experts_implementation == "grouped_mm"
    logits(loaded.model)


def test_eager_function_is_the_classes_own_forward():
    loaded = load_model(str(tiny()), device=CPU)
    by_kernel = logits(loaded.model)
    eager = {layer.index: stock_function(layer.module, "eager") for layer in loaded.layers}

    with installed(loaded.model, loaded.layers, lambda layer: eager[layer.index]):
        by_loop = logits(loaded.model)

    assert torch.allclose(by_kernel, by_loop, atol=1e-3)


def test_unknown_implementation_is_refused_with_the_known_ones():
    loaded = load_model(str(tiny()), device=CPU)

    with pytest.raises(UsageError, match=r"'turbo'; allowed: eager, .*grouped_mm"):
        stock_function(loaded.layers[0].module, "turbo")


@pytest.mark.parametrize("family", [DENSE])
def test_a_model_without_experts_is_refused_in_a_sentence(family):
    with pytest.raises(ResourceError) as refused:
        load_model(str(tiny(family)), device=CPU)

    assert is_a_sentence(refused.value)
    assert "LlamaForCausalLM" in str(refused.value)


def test_a_family_with_modules_per_expert_is_refused_in_a_sentence():
    import transformers

    config = transformers.SwitchTransformersConfig(
        d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2, num_experts=4, vocab_size=32
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)

    with pytest.raises(ResourceError) as refused:
        expert_layers(model)

    assert is_a_sentence(refused.value)


def is_a_sentence(error: ExpertFlowError) -> bool:
    return bool(re.fullmatch(r"[A-Z'].*[.]", str(error))) and "\n" not in str(error)


def test_missing_folder_is_a_resource_error_that_names_it(tmp_path):
    with pytest.raises(ResourceError, match="nothing-here"):
        load_model(str(tmp_path / "nothing-here"), device=CPU)


def test_folder_without_weights_is_a_resource_error(tmp_path):
    (tmp_path / "config.json").write_text((tiny() / "config.json").read_text())

    with pytest.raises(ResourceError, match="could not be loaded"):
        load_model(str(tmp_path), device=CPU)


def test_truncated_weights_are_a_resource_error(tmp_path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])

    with pytest.raises(ResourceError, match="could not be loaded"):
        load_model(str(folder), device=CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_is_a_resource_error():
    with pytest.raises(ResourceError, match="No CUDA device"):
        choose_device("cuda")


def test_unknown_device_and_dtype_are_refused_with_what_is_allowed():
    with pytest.raises(UsageError, match="allowed: auto, cpu, cuda"):
        choose_device("tpu")
    with pytest.raises(UsageError, match="allowed: auto, bfloat16"):
        choose_dtype("int4", CPU)


def test_auto_dtype_is_float32_on_the_cpu():
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
