"""Packed blocks, the slot arena, and computing on slots: every byte kept, every bit the same."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from expertflow.tracer.blocks import BlockLayout, HostBlocks, SlotArena, StandIn
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.hooks import ALIGNMENT_BYTES, align, stock_function
from expertflow.tracer.load import load_model
from expertflow.tracer.slotwise import SlotCompute, combine
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import FAMILIES, tiny

CPU = torch.device("cpu")


def load(family: str = "olmoe", dtype: str = "auto", **changes: int):
    return load_model(str(tiny(family, **changes)), device=CPU, dtype=dtype)


def originals(loaded) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (layer.index, name): getattr(layer.module, name).detach().clone()
        for layer in loaded.layers
        for name in layer.weight_names
    }


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_comes_back_out_of_its_block(family, tier):
    loaded = load(family)
    before = originals(loaded)

    blocks = HostBlocks(loaded.layers, tier=tier)

    for (layer, name), stacked in before.items():
        for expert in range(loaded.shape.num_experts):
            row = blocks.block(ExpertKey(layer, expert))[None]
            assert torch.equal(blocks.layout.views(row)[name][0], stacked[expert])
    assert blocks.num_bytes == loaded.shape.total_experts * loaded.shape.expert_bytes
    blocks.close()


def test_biases_are_packed_too():
    loaded = load("gpt_oss")
    before = originals(loaded)

    names = [place.name for place in BlockLayout.of(loaded.layers[0]).places]

    assert set(names) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    assert any(stacked.abs().sum() > 0 for (_, name), stacked in before.items() if "bias" in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("intermediate", [7, 24])
def test_tensors_inside_a_block_are_aligned_and_apart(dtype, intermediate):
    loaded = load("mixtral", dtype, intermediate_size=intermediate)

    layout = BlockLayout.of(loaded.layers[0])

    assert layout.block_bytes % ALIGNMENT_BYTES == 0
    ends = 0
    for place in layout.places:
        assert place.offset % ALIGNMENT_BYTES == 0
        assert place.offset >= ends
        ends = place.offset + place.num_bytes
    assert ends <= layout.block_bytes


@pytest.mark.parametrize(("size", "aligned"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_align_rounds_up(size, aligned):
    assert align(size) == aligned


def test_models_own_expert_weights_are_emptied():
    loaded = load()

    blocks = HostBlocks(loaded.layers)

    for layer in loaded.layers:
        for name in layer.weight_names:
            assert getattr(layer.module, name).numel() == 0
    held = sum(t.nbytes for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert held == loaded.shape.non_expert_bytes
    blocks.close()


def test_disk_tier_lives_in_a_file_that_closing_removes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load()

    blocks = HostBlocks(loaded.layers, tier="disk")
    [file] = tmp_path.iterdir()
    size = file.stat().st_size
    blocks.close()
    blocks.close()

    assert size == loaded.shape.total_experts * loaded.shape.expert_bytes
    assert list(tmp_path.iterdir()) == []


def test_disk_tier_without_a_folder_to_write_to_is_a_resource_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    loaded = load()

    with pytest.raises(ResourceError, match="Set TMPDIR"):
        HostBlocks(loaded.layers, tier="disk")


def test_arena_weights_are_views_of_its_slots():
    loaded = load("gpt_oss")
    blocks = HostBlocks(loaded.layers)
    arena = SlotArena(blocks.layout, 3, CPU)

    arena.slot(2).copy_(blocks.block(ExpertKey(1, 3)))

    expected = blocks.layout.views(blocks.block(ExpertKey(1, 3))[None])
    for name, weight in arena.weights.items():
        assert weight.untyped_storage().data_ptr() == arena.buffer.untyped_storage().data_ptr()
        assert torch.equal(weight[2], expected[name][0])
        assert not weight[:2].any()
        assert arena.part(range(1, 3))[name].data_ptr() == weight[1].data_ptr()
    assert arena.num_bytes == 3 * loaded.shape.expert_bytes
    blocks.close()


def test_stand_in_has_the_arenas_weights_and_the_modules_everything_else():
    loaded = load()
    blocks = HostBlocks(loaded.layers)
    arena = SlotArena(blocks.layout, 5, CPU)
    module = loaded.layers[0].module

    stand_in = StandIn(module, arena.part(range(1, 4)))

    assert stand_in.num_experts == 3
    assert stand_in.gate_up_proj.shape[0] == 3
    assert stand_in.act_fn is module.act_fn
    assert stand_in.is_transposed == module.is_transposed
    blocks.close()


class Layer:
    """One layer with its stock result, and its experts packed."""

    def __init__(
        self, family: str, dtype: str = "auto", tokens: int = 9, *, wide_weights: bool = False
    ):
        loaded = load(family, dtype)
        layer = loaded.layers[-1]
        self.shape = loaded.shape
        self.module = layer.module
        self.stock = stock_function(layer.module, "grouped_mm")
        generator = torch.Generator().manual_seed(3)
        kind = loaded.model.dtype
        self.states = torch.randn(tokens, 32, generator=generator).to(kind)
        scores = torch.rand(tokens, self.shape.num_experts, generator=generator)
        weights, self.index = scores.topk(self.shape.top_k, dim=1)
        self.weights = weights if wide_weights else weights.to(kind)
        with torch.inference_mode():
            self.expected = self.stock(layer.module, self.states, self.index, self.weights)
        self.blocks = HostBlocks(loaded.layers)
        self.number = layer.index

    def slotwise(self, slots: int, first_slot: int = 0) -> tuple[SlotCompute, SlotArena]:
        arena = SlotArena(self.blocks.layout, slots, CPU)
        stand_in = StandIn(self.module, arena.part(range(first_slot, slots)))
        compute = SlotCompute(
            stand_in, self.stock, num_experts=self.shape.num_experts, first_slot=first_slot
        )
        return compute, arena

    def fill(self, arena: SlotArena, experts, slots) -> None:
        for expert, slot in zip(experts, slots, strict=True):
            arena.slot(slot).copy_(self.blocks.block(ExpertKey(self.number, expert)))

    def in_waves(self, waves: list[list[int]]) -> torch.Tensor:
        compute, arena = self.slotwise(max(len(wave) for wave in waves))
        partial = None
        with torch.inference_mode():
            for experts in waves:
                slots = list(reversed(range(len(experts))))
                self.fill(arena, experts, slots)
                chosen = self.index.numpy()
                partial = compute.wave(experts, slots, self.states, chosen, partial)
            return combine(partial, self.states, self.weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_event_on_permuted_slots_is_bit_identical_to_stock(family, dtype):
    layer = Layer(family, dtype)
    experts = np.unique(layer.index.numpy()).tolist()
    slots = (np.random.default_rng(5).permutation(len(experts) + 2)[: len(experts)] + 1).tolist()
    compute, arena = layer.slotwise(len(experts) + 3, first_slot=1)
    layer.fill(arena, experts, slots)

    with torch.inference_mode():
        output = compute.whole(experts, slots, layer.states, layer.index.numpy(), layer.weights)

    assert torch.equal(output, layer.expected)


def test_a_wrong_expert_in_a_slot_changes_the_result():
    layer = Layer("olmoe")
    experts = np.unique(layer.index.numpy()).tolist()
    compute, arena = layer.slotwise(len(experts))
    layer.fill(arena, experts, [*range(1, len(experts)), 0])

    with torch.inference_mode():
        output = compute.whole(
            experts, range(len(experts)), layer.states, layer.index.numpy(), layer.weights
        )

    assert not torch.allclose(output, layer.expected, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_waves_of_one_are_bit_identical_to_stock(family, dtype):
    layer = Layer(family, dtype)

    output = layer.in_waves([[expert] for expert in np.unique(layer.index.numpy()).tolist()])

    assert torch.equal(output, layer.expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_weights_wider_than_the_states_change_nothing(family):
    layer = Layer(family, "bfloat16", wide_weights=True)

    output = layer.in_waves([[expert] for expert in np.unique(layer.index.numpy()).tolist()])

    assert output.dtype == layer.expected.dtype
    assert torch.equal(output, layer.expected)


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def layer(request):
    return Layer(request.param, tokens=13)


@st.composite
def partitions(draw, items):
    """Items in any order, cut anywhere."""
    order = draw(st.permutations(items))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(items) - 1)), max_size=len(items))))
    edges = [0, *[cut for cut in cuts if cut < len(items)], len(items)]
    return [order[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_partition_into_waves_is_bit_identical_to_stock(layer, data):
    waves = data.draw(partitions(np.unique(layer.index.numpy()).tolist()))

    output = layer.in_waves(waves)

    assert torch.equal(output, layer.expected)


def test_arena_too_large_for_the_device_names_the_slots():
    blocks = HostBlocks(load().layers)

    with pytest.raises((ResourceError, RuntimeError)):
        SlotArena(blocks.layout, 2**50, CPU)
    blocks.close()


def test_no_block_file_is_left_in_the_temporary_folder():
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("expertflow-blocks-*"))
    blocks = HostBlocks(load().layers, tier="disk")
    blocks.close()

    assert set(Path(tempfile.gettempdir()).glob("expertflow-blocks-*")) <= before
