"""Every family of the installed transformers that has experts: traced and proved, or refused in a sentence."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from expertflow.tracer.check import check_trace
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.generate import Prompt, greedy
from expertflow.tracer.hooks import expert_layers, gate_choice, installed, stock_function
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.prompts import PromptText
from expertflow.tracer.record import Recorder, Recording, ResidentExperts, record_run
from expertflow.tracer.store import Trace
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.writer import TraceWriter

from tests.families import REFUSED, SERVED, families, folder, refusal
from tests.models import tiny
from tests.routers import Listener, routers

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "families.md"
CPU = torch.device("cpu")
PROMPTS = [Prompt(0, (40, 41, 42, 43, 44)), Prompt(1, (70, 75, 80))]
NEW_TOKENS = 4


@pytest.fixture(scope="module", params=SERVED)
def loaded(request):
    return load_model(str(folder(request.param)), device=CPU)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("families") / "t").manifest


def is_diffusing(loaded) -> bool:
    return hasattr(loaded.model.config, "canvas_length")


def traced(loaded, manifest, out, prompts=PROMPTS, lookahead=0):
    """Trace the prompts, as one batch where the family can. Returns the trace and the text."""
    names = [f"lookahead_{depth}" for depth in range(1, lookahead + 1)]
    with TraceWriter(
        out,
        shape=loaded.shape,
        hardware=manifest.hardware,
        run=manifest.run,
        provenance=manifest.provenance,
        recorded=("routing", "steps", "weights", "token_ids", *names),
    ) as writer:
        recorder = Recorder(loaded, writer, CPU, Recording(lookahead=lookahead))
        outputs = record_run(
            recorder,
            prompts,
            [PromptText(str(prompt.sequence), "", "text") for prompt in prompts],
            batch_size=1 if is_diffusing(loaded) else len(prompts),
            max_new_tokens=NEW_TOKENS,
            make=lambda layer: ResidentExperts(recorder, layer),
            advance=lambda tokens: None,
        )
        recorder.write()
        writer.close(memory=[], warnings=[])
    check_trace(out)
    return Trace.open(out), outputs


# --- the proof -----------------------------------------------------------------------------------


def test_recorded_ids_are_those_the_router_means(loaded, manifest, tmp_path):
    listener = Listener(loaded.model)
    trace, _ = traced(loaded, manifest, tmp_path / "t")
    listener.close()

    routing = trace.routing_arrays()
    layers = len(loaded.layers)
    # Where two passes share their experts, a layer has a router in each.
    assert len(listener.routers) == layers * (2 if is_diffusing(loaded) else 1)
    for layer in range(layers):
        rows = routing.layer == layer
        recorded = np.sort(routing.experts[rows], axis=1)
        if is_diffusing(loaded):
            steps = routing.step[rows]
            is_decode = routing.phase_is_decode[rows]
            compare(recorded[~is_decode], listener.calls[layer])
            compare(recorded[is_decode], listener.calls[layers + layer])
            assert len(np.unique(steps)) > 2
        else:
            compare(recorded, listener.calls[layer])
        assert len(np.unique(recorded)) > loaded.shape.top_k  # not all tokens alike


def compare(recorded, calls) -> None:
    expected = torch.cat(calls).numpy()
    assert recorded.shape == expected.shape
    assert np.array_equal(recorded, expected)


def test_shape_agrees_with_config_and_modules(loaded):
    config, shape = loaded.model.config.get_text_config(decoder=True), loaded.shape
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    told = {getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)}
    if hasattr(config, "ffn_config"):
        told = {config.ffn_config.moe_num_experts}

    assert told == {shape.num_experts}
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        sparse = [number for number, kind in enumerate(kinds) if kind != "dense"]
        assert list(shape.moe_layers) == sparse
    for stack in shape.stacks:
        numbers = [shape.moe_layers[place] for place in stack]
        assert numbers == sorted(set(numbers))
    for layer in loaded.layers:
        own = routers_top_k(loaded.model)
        assert own <= {shape.top_k}
        assert layer.module.num_experts == shape.num_experts
        assert "shared" not in layer.name


def routers_top_k(model) -> set[int]:
    return {router.top_k for router in routers(model) if hasattr(router, "top_k")}


def test_text_is_that_of_generate(loaded, manifest, tmp_path):
    if is_diffusing(loaded):
        pytest.skip("the library's own loop runs")
    loaded.model.generation_config.eos_token_id = None
    width = max(len(prompt.token_ids) for prompt in PROMPTS)
    is_right = loaded.model.config.is_encoder_decoder
    ids = [padded(prompt.token_ids, width, loaded.pad_id, is_right) for prompt in PROMPTS]
    mask = [padded([1] * len(prompt.token_ids), width, 0, is_right) for prompt in PROMPTS]
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    ours = greedy(
        loaded.model,
        PROMPTS,
        max_new_tokens=NEW_TOKENS,
        eos_ids=frozenset(),
        pad_id=loaded.pad_id,
        first_step=0,
        observer=SilentObserver(),
    )
    theirs = loaded.model.generate(
        **given,
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=loaded.pad_id,
    )

    start = 1 if is_right else width
    assert [one.token_ids for one in ours] == theirs[:, start:].tolist()


def padded(ids, width, pad, is_right) -> list[int]:
    space = [pad] * (width - len(ids))
    return [*ids, *space] if is_right else [*space, *ids]


def test_gates_asked_early_choose_what_the_layer_chooses(loaded):
    calls = []

    def make(layer):
        stock = stock_function(layer.module, loaded.implementation)

        def seen(module, states, chosen, weights):
            calls.append((layer, states, chosen))
            return stock(module, states, chosen, weights)

        return seen

    with installed(loaded.model, loaded.layers, make):
        greedy(
            loaded.model,
            PROMPTS[:1],
            max_new_tokens=2,
            eos_ids=frozenset(),
            pad_id=loaded.pad_id,
            first_step=0,
            observer=SilentObserver(),
        )

    assert {layer.index for layer, *_ in calls} == set(range(len(loaded.layers)))
    for layer, states, chosen in calls:
        if layer.gate is not None:
            with torch.inference_mode():
                early = gate_choice(layer.gate, states, loaded.shape.top_k)
            assert torch.equal(early.sort(dim=1).values, chosen.sort(dim=1).values), layer.name


# --- the page ------------------------------------------------------------------------------------


def page() -> str:
    """What the script writes; in this process, where the models have been built already."""
    spec = importlib.util.spec_from_file_location("families_doc", ROOT / "scripts/families_doc.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render()


def test_page_lists_every_family_with_its_verdict():
    written = PAGE.read_text(encoding="utf-8")
    made_with = re.search(r"transformers (\d+\.\d+\.\d+)", written)
    assert made_with
    told = dict(re.findall(r"^\| `(\w+)` \| (served|refused) \|", written, re.MULTILINE))

    here = {family: "served" if family in SERVED else "refused" for family in families()}
    if made_with[1] == transformers.__version__:
        assert told == here
        assert written == page()
    else:
        served = {family for family, verdict in here.items() if verdict == "served"}
        assert not [family for family in served if told.get(family) == "refused"]


@pytest.mark.parametrize("family", [family for family in REFUSED if family in families()])
def test_refusals_are_sentences_that_name_the_model(family):
    reason = refusal(family)

    assert reason is not None
    assert re.fullmatch(r"[A-Z'].*[.]", reason)
    assert "\n" not in reason
    assert re.search(r"For[A-Z]|Config|Backbone", reason)


# --- what the families taught --------------------------------------------------------------------


def test_padding_and_towers_are_marked_in_an_encoder_decoder_trace(manifest, tmp_path):
    loaded = replace(
        load_model(str(folder("switch_transformers")), device=CPU), eos_ids=frozenset()
    )
    trace, _ = traced(loaded, manifest, tmp_path / "t")
    routing = trace.routing_arrays()

    assert [list(stack) for stack in loaded.shape.stacks] == [[0, 1], [2, 3]]
    assert set(routing.layer[~routing.phase_is_decode]) == {0, 1}
    assert set(routing.layer[routing.phase_is_decode]) == {2, 3}
    encoder = (routing.layer == 0) & (routing.sequence == 1)
    assert routing.position[encoder].tolist() == [0, 1, 2, -1, -1]
    decoder = (routing.layer == 2) & (routing.sequence == 1)
    assert routing.position[decoder].tolist() == [3, 4, 5, 6]


def test_a_token_over_capacity_keeps_the_routers_choice_with_weight_zero(manifest, tmp_path):
    loaded = load_model(str(folder("switch_transformers")), device=CPU)
    for router in routers(loaded.model):
        router.expert_capacity = 1
    long = [Prompt(0, tuple(range(40, 90)))]

    listener = Listener(loaded.model)
    trace, _ = traced(loaded, manifest, tmp_path / "t", long)
    listener.close()

    routing = trace.routing_arrays()
    own = routing.layer == 0
    assert routing.weights is not None
    dropped = routing.weights[own, 0] == 0
    chosen = routing.experts[own, 0]
    compare(routing.experts[own], listener.calls[0])
    mask = router_mask(routers(loaded.model)[0], torch.randn(1, 50, 32))
    if mask.sum() == 50:  # in some versions of the library the capacity has no effect
        assert not dropped.any()
    else:
        assert dropped.sum() == len(chosen) - len(np.unique(chosen))


def router_mask(router, states) -> torch.Tensor:
    [mask] = (part for part in router(states) if not part.is_floating_point())
    return mask


def test_switch_computes_what_the_library_computes():
    path = folder("switch_transformers")
    stock = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(path).eval()
    ours = load_model(str(path), device=CPU).model
    ids = torch.arange(20, 60)[None]

    with torch.inference_mode():
        expected = stock(input_ids=ids, decoder_input_ids=ids[:, :7]).logits
        got = ours(input_ids=ids, decoder_input_ids=ids[:, :7]).logits

    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["dbrx", "llama4", "step3p7"])
def test_families_behind_an_adapter_compute_what_the_library_computes(family):
    path = folder(family)
    ours = load_model(str(path), device=CPU).model
    stock = type(ours).from_pretrained(path).eval()
    ids = torch.arange(20, 60)[None]

    with torch.inference_mode():
        assert torch.allclose(ours(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-4)


def test_nllb_runs_the_two_experts_its_router_chose():
    path = folder("nllb_moe")
    stock = transformers.NllbMoeForConditionalGeneration.from_pretrained(path).eval()
    loaded = load_model(str(path), device=CPU)
    block = stock.model.encoder.layers[0].ffn
    ours = loaded.model.model.encoder.layers[0].ffn
    states = torch.randn(1, 12, 32)

    with torch.inference_mode():
        _, weights, logits = block.router(states[0], None)
        expected = torch.stack(
            [
                sum(
                    weights[token, expert] * block.experts[f"expert_{expert}"](states[0, token])
                    for expert in logits[token].topk(2).indices.tolist()
                )
                for token in range(12)
            ]
        ) * (1 - stock.config.moe_token_dropout)
        got = ours(states)[0]

    assert torch.allclose(got, expected, atol=1e-4)
    assert any("NLLB" in note for note in loaded.notes)


def test_denoising_passes_are_decode_steps_over_one_block(manifest, tmp_path):
    loaded = load_model(str(folder("diffusion_gemma")), device=CPU)
    trace, outputs = traced(loaded, manifest, tmp_path / "t", PROMPTS[:1])
    routing = trace.routing_arrays()

    first = routing.layer == 0
    block = routing.position[first & routing.phase_is_decode].reshape(-1, 8)
    assert len(block) == 3  # denoising steps
    assert (block == np.arange(5, 13)).all()
    assert routing.position[first & ~routing.phase_is_decode].tolist() == [0, 1, 2, 3, 4]
    assert 0 < len(outputs[0].token_ids) <= NEW_TOKENS


def test_image_tokens_are_marked_as_such(manifest, tmp_path):
    loaded = load_model(str(folder("qwen3_vl_moe")), device=CPU)
    config = loaded.model.config
    vision = config.vision_config
    # An id outside the tiny vocabulary cannot be embedded; the real one can.
    config.image_token_id = 200
    loaded = replace(loaded, modalities={200: "image"})
    side = vision.spatial_merge_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    torch.manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(side * side, size),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 0]]),
    }
    ids = (40, 41, 200, 42)
    trace, outputs = traced(loaded, manifest, tmp_path / "t", [Prompt(0, ids, (), inputs)])
    theirs = loaded.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, 4, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=loaded.pad_id,
        **inputs,
    )

    assert outputs[0].token_ids == theirs[0, 4:].tolist()[: len(outputs[0].token_ids)]

    rows = trace.table("routing").to_pandas()
    prompt = rows[(rows.layer == 0) & (rows.phase == "prefill")]
    assert prompt.modality.tolist() == ["text", "text", "image", "text"]
    assert (rows[rows.phase == "decode"].modality == "text").all()


def test_experts_of_another_modality_are_refused_when_they_are_called():
    loaded = load_model(str(folder("ernie4_5_vl_moe")), device=CPU)
    states = torch.randn(3, 32)
    block = loaded.model.model.language_model.layers[1].mlp

    with (
        pytest.raises(ResourceError, match="tokens that are not text"),
        installed(loaded.model, loaded.layers, lambda layer: lambda *args: args[1]),
    ):
        block.vision_moe(states)


def test_layers_that_differ_are_refused(tmp_path):
    loaded = load_model(str(tiny("olmoe")), device=CPU)
    experts = loaded.layers[1].module
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:4].clone()))
    experts.num_experts = 4
    with pytest.raises(ResourceError, match="different number or size"):
        expert_layers(loaded.model)
