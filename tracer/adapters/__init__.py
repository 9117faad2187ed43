"""Families whose experts need more than the registry: one small file each, and a reason for those not served.

An adapter is found by the class name of a module and changes that module in place, so that its experts are stacked
behind the registry like any other family's. Nothing is computed differently, but where a docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ResourceError
from . import dbrx, diffusion_gemma, llama4, nllb_moe, step3p7, switch_transformers

Adapter = Callable[[Any, Any], str | None]

ADAPTERS: dict[str, Adapter] = {
    "DbrxFFN": dbrx.adapt,
    "DiffusionGemmaModel": diffusion_gemma.adapt,
    "Llama4TextMoe": llama4.adapt,
    "NllbMoeSparseMLP": nllb_moe.adapt,
    "Step3p7SparseMoeBlock": step3p7.adapt,
    "SwitchTransformersSparseMLP": switch_transformers.adapt,
}
"""Class name of a module to what changes it. An adapter may return a sentence the user should know."""

REFUSED: dict[str, str] = {
    "DogeCDMoE": "its experts are rows of an embedding, thousands to a layer and chosen by product keys, "
    "not blocks of weights that could be loaded one by one",
    "JetMoeMoE": "its attention has experts as well, of another size, and a trace describes one kind of expert",
    "LongcatFlashExperts": "some of its experts are empty (a token may choose to skip), and a trace cannot "
    "say that a choice needs no expert",
    "OpenAIPrivacyFilterExperts": "it labels tokens and generates none",
    "VitPoseBackboneMoeMLP": "it has no router: the caller names the expert, one for each data set",
    "ZayaExperts": "a token may choose to skip its expert, and a trace cannot say that a choice needs no "
    "expert (the library passes it on as expert 0 with weight 0)",
}
"""Class name of a module to why its family is not served, to be read after 'X cannot be traced: '."""


def adapt(model: nn.Module) -> tuple[str, ...]:
    """Put the model's experts behind the registry where the library does not; returns what the user should know.

    Raises ResourceError for a family that is not served, with the reason.
    """
    notes: dict[str, None] = {}
    for module in list(model.modules()):
        name = type(module).__name__
        if name in REFUSED:
            raise ResourceError(
                f"{type(model).__name__} cannot be traced: {REFUSED[name]}. See docs/families.md for the "
                "families that can."
            )
        note = ADAPTERS[name](module, model) if name in ADAPTERS else None
        if note is not None:
            notes[note] = None
    return tuple(notes)
