"""Loads a model larger than memory: its experts go straight into a file, while all else stays in memory.

The library loads a checkpoint tensor by tensor and puts each into its module. Here the modules of experts put
what they are given into a block file, and keep a view of it. One layer's weights are in memory at a time, and what the
library makes of them on the way: about three times a layer's experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .blocks import HostBlocks
from .errors import ResourceError
from .hooks import ExpertLayer, expert_layers

_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"
"""The library reads ahead with threads as fast as it can, into memory, unless told otherwise."""


def load_streamed(
    kind: Any, config: Any, source: str, arguments: Mapping[str, Any]
) -> tuple[Any, HostBlocks | None]:
    """`kind.from_pretrained(source, **arguments)` with the experts in a file, and their blocks.

    `kind` may be an auto class. Families that keep experts in their own way (adapters) are loaded as ever, without
    blocks. Raises ResourceError if the file has no room.
    """
    kind = _concrete(kind, config)
    if getattr(kind, "config_class", None) is not type(
        config
    ):  # part of a larger model: the library knows how
        return kind.from_pretrained(source, **arguments), None
    made: list[_Diverted] = []
    streaming = type(kind.__name__, (kind,), {"__init__": _diverting(kind, made)})
    streaming.__module__, streaming.__qualname__ = kind.__module__, kind.__qualname__
    try:
        with _without_read_ahead():
            model = streaming.from_pretrained(source, **arguments)
    except BaseException:
        for diverted in made:
            diverted.blocks.close()
        raise
    for diverted in made:
        diverted.restore()
    model.__class__ = kind
    return model, made[0].blocks if made else None


def _concrete(kind: Any, config: Any) -> Any:
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is None or type(config) not in mapping:
        return kind
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def _diverting(kind: Any, made: list[_Diverted]) -> Callable[..., None]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        try:
            layers = expert_layers(self)
        except ResourceError:
            return
        made.append(_Diverted(layers))

    return init


class _Diverted:
    """The layers of a model whose weights are on their way into blocks."""

    def __init__(self, layers: list[ExpertLayer]) -> None:
        self.blocks = HostBlocks(layers, tier="disk", is_empty=True)
        self._modules = [(layer.module, type(layer.module)) for layer in layers]
        for layer in layers:
            _divert(layer, self.blocks.stacked(layer.index))

    def restore(self) -> None:
        """Make the modules what they were; their weights stay where they are."""
        for module, kind in self._modules:
            module.__class__ = kind


def _divert(layer: ExpertLayer, places: Mapping[str, torch.Tensor]) -> None:
    kind = type(layer.module)

    def put(module: nn.Module, name: str, value: Any) -> None:
        if name in places and isinstance(value, torch.Tensor) and not value.is_meta:
            places[name].copy_(value.detach())
            value = nn.Parameter(places[name], requires_grad=False)
            value._is_hf_initialized = True  # or the library draws it anew
        kind.__setattr__(module, name, value)

    layer.module.__class__ = type(kind.__name__, (kind,), {"__setattr__": put})


@contextmanager
def _without_read_ahead() -> Iterator[None]:
    before = os.environ.get(_READ_AHEAD)
    os.environ[_READ_AHEAD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_READ_AHEAD]
        else:
            os.environ[_READ_AHEAD] = before
