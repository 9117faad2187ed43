"""Model inputs beside tokens, such as pixels: those of single prompts as those of a batch.

Processors give two kinds. What goes along the tokens is padded at the left, as the tokens are. What goes along the
images is padded at its far ends to the largest and listed prompt behind prompt. tracer/images.py checks with the
model's own processor that this is what it would have made of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from .errors import UsageError


def joined_inputs(inputs: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    """Inputs of a batch from those of its prompts, which are `lengths` tokens long; some may have none.

    Raises UsageError for inputs that cannot be joined.
    """
    if len(inputs) == 1:
        return dict(inputs[0])
    names = dict.fromkeys(name for each in inputs for name in each)
    return {name: _joined(name, [each.get(name) for each in inputs], lengths) for name in names}


def _joined(name: str, values: Sequence[Any], lengths: Sequence[int]) -> torch.Tensor:
    given = [value for value in values if value is not None]
    if not all(isinstance(value, torch.Tensor) for value in given):
        raise cannot_join(name)
    if len({value.dim() for value in given}) != 1 or given[0].dim() == 0:
        raise cannot_join(name)
    if all(
        value is None or is_along_tokens(value, length)
        for value, length in zip(values, lengths, strict=True)
    ):
        return _along_tokens(values, lengths)
    return torch.cat([_filled(value, _largest(given)) for value in given])


def is_along_tokens(value: Any, length: int) -> bool:
    """Whether an input of one prompt holds something for each of its `length` tokens."""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and value.shape == (1, length)
    )


def cannot_join(name: str) -> UsageError:
    """The error for an input that the prompts of a batch cannot share."""
    return UsageError(
        f"The images of these prompts cannot share a batch: the model's processor makes {name} of them in a form that "
        "is not joined. Use --batch-size 1."
    )


def _along_tokens(values: Sequence[torch.Tensor | None], lengths: Sequence[int]) -> torch.Tensor:
    width = max(lengths)
    like = next(value for value in values if value is not None)
    rows = like.new_zeros((len(values), width))
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if value is not None:
            rows[row, width - length :] = value[0]
    return rows


def _largest(values: Sequence[torch.Tensor]) -> list[int]:
    """The largest size in each dimension but the first."""
    return [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]


def _filled(value: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """`value` with zeros behind it in every dimension but the first, up to `sizes`."""
    missing = [size - own for size, own in zip(sizes, value.shape[1:], strict=True)]
    return pad(value, [side for size in reversed(missing) for side in (0, size)])
