"""The shape of a model of which only routing is known: what was told, what was seen, what was guessed."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..types import ModelShape
from .request import ImportRequest
from .untimed import Routing

_DTYPE = "bfloat16"


def imported_shape(
    request: ImportRequest,
    routing: Routing,
    warnings: list[str],
    *,
    experts: int | None = None,
    moe_layers: Sequence[int] | None = None,
    num_layers: int | None = None,
) -> ModelShape:
    """Return the shape; guesses are told in `warnings`.

    `experts`, `moe_layers` (in the numbers of the model's own layers) and `num_layers` are what the file knows.
    Raises InputError if it names an expert that cannot be.
    """
    seen = int(routing.experts.max()) + 1
    told = request.experts or experts
    if told is not None and told < seen:
        said = f"--experts {told}" if request.experts else f"the file's map of {told} experts"
        raise InputError(
            f"{request.file}: it names expert {seen - 1}, but {said} allows 0 to {told - 1}. "
            f"Pass --experts {seen} or more."
        )
    if told is None:
        warnings.append(
            f"The number of experts per layer, {seen}, is guessed from the highest id; give it with "
            "--experts."
        )
    if request.dtype is None:
        warnings.append(f"The number format {_DTYPE} is a guess; give it with --dtype.")
    _tell_unknown(request, warnings)
    layers = moe_layers or range(routing.experts.shape[1])
    return ModelShape(
        model_id=request.model or request.file.stem,
        revision=None,
        architecture="Imported",
        dtype=request.dtype or _DTYPE,
        num_layers=num_layers or max(layers) + 1,
        moe_layers=tuple(layers),
        num_experts=told or seen,
        top_k=routing.experts.shape[2],
        expert_bytes=request.expert_bytes,
        non_expert_bytes=request.non_expert_bytes,
        kv_bytes_per_token=0,
        hidden_size=request.hidden_size,
        vocab_size=0,
    )


def _tell_unknown(request: ImportRequest, warnings: list[str]) -> None:
    sizes = {
        "--expert-bytes": request.expert_bytes,
        "--non-expert-bytes": request.non_expert_bytes,
        "--hidden-size": request.hidden_size,
    }
    unknown = [option for option, size in sizes.items() if not size]
    if unknown:
        warnings.append(
            f"Not given and therefore 0: {', '.join(unknown)}. Hits can be replayed; bytes and times "
            "need the sizes."
        )
