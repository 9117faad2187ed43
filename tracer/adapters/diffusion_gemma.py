"""DiffusionGemma: encoder and decoder are two passes through the same weights, so each layer's experts are one."""

from __future__ import annotations

from typing import Any

from ..errors import ResourceError


def adapt(model: Any, whole: Any) -> None:
    """Give both passes the same experts module. Raises ResourceError if their weights are not shared."""
    layers = zip(model.encoder.language_model.layers, model.decoder.layers, strict=True)
    for number, (encoder, decoder) in enumerate(layers):
        if encoder.experts.down_proj is not decoder.experts.down_proj:
            raise ResourceError(
                f"Encoder and decoder of {type(whole).__name__} have experts of their own in layer {number}, where "
                "the model shares them. The checkpoint cannot be traced."
            )
        encoder.experts = decoder.experts
