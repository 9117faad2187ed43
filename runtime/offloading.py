"""Three lines that give back a normal transformers model with its experts offloaded.

from expertflow.runtime import offload
model = offload("org/model", "policy.json")
model.generate(**inputs)
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from ..simulator.policy.spec import check_shape, read_policy
from ..tracer.generate import StepTokens
from ..tracer.load import choose_device, load_model
from ..tracer.placement import use_threads
from ..tracer.quantities import LinkSpec
from ..tracer.timing import StepInfo
from .deploy import path_predictor
from .machine import Machine
from .session import Session


class Offloaded:
    """What hangs on the model as `model.expertflow`: live counters, and `close`."""

    def __init__(self, machine: Machine, session: Session) -> None:
        self._machine = machine
        self._session = session

    def stats(self) -> dict[str, float]:
        """Counters since loading: demanded, hits, lates, misses, bytes moved, slots."""
        outcomes = self._session.outcomes
        demanded = sum(outcomes.values())
        return {
            **outcomes,
            "demanded": demanded,
            "hit_rate": outcomes["hits"] / demanded if demanded else 0.0,
            "bytes_moved": self._session.store.count_bytes(),
            "slot_bytes": self._session.store.arena.num_bytes,
        }

    def close(self) -> None:
        """Stop the copy engine. The model cannot run afterwards: its experts live in the slots."""
        self._session.close()
        self._machine.close()


def offload(
    model_id: str,
    policy: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    link: str | None = None,
    paths: str | Path | None = None,
) -> Any:
    """Load a model with its experts in host memory, under a policy, ready for `generate`.

    `paths` is the folder of a trained path predictor, for policies that ask one.

    Raises PolicyError if the policy was made for another shape, ResourceError if it does not fit.
    """
    chosen = read_policy(Path(policy))
    target = choose_device(device)
    use_threads(None, target)
    loaded = load_model(model_id, device=target, dtype=dtype)
    check_shape(chosen.shape, loaded.shape)
    predictor = path_predictor(Path(paths) if paths else None, target, chosen.shape)
    machine = Machine(loaded, target, link=LinkSpec.parse(link) if link else None, paths=predictor)
    session = Session(
        loaded,
        machine.blocks,
        chosen.behaviour,
        target,
        link=machine.link,
        keep_log=False,
        paths=predictor,
    )
    _count_steps(loaded.model, session)
    loaded.model.expertflow = Offloaded(machine, session)
    weakref.finalize(loaded.model, session.store.close)
    return loaded.model


def _count_steps(model: Any, session: Session) -> None:
    """Tell the session of each forward pass, whoever calls it."""
    passes = prompts = 0

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes, prompts
        ids: torch.Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        shape = ids.shape if ids is not None else kwargs["inputs_embeds"].shape[:2]
        batch, query = int(shape[0]), int(shape[1])
        mask = kwargs.get("attention_mask")
        context = int(mask.shape[-1]) if isinstance(mask, torch.Tensor) else query
        prompts += batch if query > 1 else 0
        session.begin_step(
            StepInfo(
                step=passes,
                phase="prefill" if query > 1 else "decode",
                batch=batch,
                tokens=batch * query,
                context=context,
            ),
            _fed(ids, mask, prompts) if ids is not None and session.reads_tokens else None,
        )
        passes += 1

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        session.end_step()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)


def _fed(ids: torch.Tensor, mask: Any, last: int) -> StepTokens | None:
    """The tokens of a pass by sequence and position; sequences are numbered over all prompts, of which `last` began."""
    batch, query = ids.shape
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        places = torch.where(mask.bool(), mask.cumsum(dim=1) - 1, -1)[:, -query:]
    elif query > 1:
        places = torch.arange(query).expand(batch, query)
    else:
        return None  # without a mask nothing tells how much came before
    sequences = [row for row in range(last - batch, last) for _ in range(query)]
    return StepTokens(sequences, places.flatten().tolist(), ids.flatten().tolist())
