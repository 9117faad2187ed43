"""Packing experts never holds them twice, and gives them back if their pages cannot be locked."""

import pytest
import torch
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.load import load_model

from tests.models import tiny

CPU = torch.device("cpu")


def output(loaded) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(input_ids=torch.arange(2, 30)[None]).logits


def own_bytes(loaded) -> int:
    """Bytes of the experts' weights that the model holds itself."""
    return sum(
        getattr(layer.module, name).numel()
        for layer in loaded.layers
        for name in layer.weight_names
    )


def test_pages_are_locked_when_the_model_has_let_go_of_its_experts(monkeypatch):
    loaded = load_model(str(tiny()), device=CPU)
    held: list[int] = []
    monkeypatch.setattr(HostBlocks, "_pin", lambda self: held.append(own_bytes(loaded)))
    assert own_bytes(loaded) > 0

    HostBlocks(loaded.layers, pin=True)

    assert held == [0]


def test_a_model_whose_pages_cannot_be_locked_still_runs(monkeypatch):
    loaded = load_model(str(tiny()), device=CPU)
    expected = output(loaded)

    def refuse(self) -> None:
        raise ResourceError("No more pages.")

    monkeypatch.setattr(HostBlocks, "_pin", refuse)
    with pytest.raises(ResourceError, match="No more pages"):
        HostBlocks(loaded.layers, pin=True)

    assert torch.equal(output(loaded), expected)
