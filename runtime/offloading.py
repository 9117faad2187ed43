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
from ..tracer.errors import UsageError
from ..tracer.generate import StepTokens
from ..tracer.load import choose_device, load_model
from ..tracer.placement import choose_tier, use_threads
from ..tracer.quantities import LinkSpec
from ..tracer.timing import StepInfo
from .counters import LiveCounters
from .deploy import RunRequest, path_predictor
from .machine import Machine, parameter_bytes, predictor_bytes
from .room import check_room
from .run_size import ONE_TOKEN
from .session import Session


class Offloaded:
    """What hangs on the model as `model.expertflow`: live counters, and `close`. Counters may be read by any thread."""

    def __init__(self, machine: Machine, session: Session) -> None:
        self._machine = machine
        self._session = session
        self._counters = LiveCounters()
        self._weight_bytes = parameter_bytes(machine.loaded)
        self._stop_serving: Any = None

    def stats(self) -> dict[str, float]:
        """Counters since loading, by name. Seconds and bytes; rates are over the time that passes took.

        demanded, hits, lates, misses and hit_rate: experts. passes, tokens (one per row of each pass), pass_s,
        tokens_per_s, stall_s and stall_share (of pass_s). bytes_moved, link_busy_s and link_Bps (while it was busy).
        Memory on the device: slot_bytes, weight_bytes, kv_cache_bytes (of the last pass), predictor_bytes; host_bytes
        are the packed experts.
        """
        counters, session = self._counters, self._session
        outcomes = dict(session.outcomes)
        demanded = sum(outcomes.values())
        shape = self._machine.loaded.shape
        return {
            **outcomes,
            "demanded": demanded,
            "hit_rate": _share(outcomes["hits"], demanded),
            "passes": counters.passes,
            "tokens": counters.tokens,
            "pass_s": counters.pass_s,
            "tokens_per_s": _share(counters.tokens, counters.pass_s),
            "stall_s": counters.stall_s,
            "stall_share": _share(counters.stall_s, counters.pass_s),
            "bytes_moved": counters.bytes_moved,
            "link_busy_s": counters.link_busy_s,
            "link_Bps": _share(counters.bytes_moved, counters.link_busy_s),
            "slot_bytes": session.store.arena.num_bytes,
            "weight_bytes": self._weight_bytes,
            "kv_cache_bytes": counters.positions * shape.kv_bytes_per_token,
            "predictor_bytes": predictor_bytes(self._machine.paths),
            "host_bytes": self._machine.blocks.num_bytes,
        }

    def stats_text(self) -> str:
        """The counters in Prometheus' text format. Raises ResourceError without the extra `metrics`."""
        from .metrics import as_text

        return as_text(self.stats)

    def serve_metrics(self, port: int) -> int:
        """Serve them to this machine alone, at http://127.0.0.1:PORT/metrics; returns the port, one that is free for 0.

        Ends with `close`. Raises ResourceError without the extra `metrics`, or if the port is taken.
        """
        from .metrics import serve

        if self._stop_serving is not None:
            raise UsageError("The metrics of this model are served already.")
        port, self._stop_serving = serve(self.stats, port)
        return port

    def ended(self, info: StepInfo) -> None:
        """A pass has run: count it."""
        self._session.end_step()
        self._counters.fold(self._session, info)

    def close(self) -> None:
        """Stop the copy engine. The model cannot run afterwards: its experts live in the slots."""
        if self._stop_serving is not None:
            self._stop_serving()
            self._stop_serving = None
        self._session.close()
        self._machine.close()


def offload(
    model_id: str,
    policy: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    link: str | None = None,
    tier: str = "ram",
    paths: str | Path | None = None,
    memory: str | None = None,
) -> Any:
    """Load a model with its experts in host memory, or on disk (`tier`), under a policy, ready for `generate`.

    `paths` is the folder of a trained path predictor, for policies that ask one. `memory` is the device memory to use,
    as 24GiB; by default what is free.

    Raises PolicyError if the policy was made for another shape, ResourceError before the model is loaded if it does not
    fit: weights, slots and a pass over one token, as nobody knows yet what will be fed.
    """
    chosen = read_policy(Path(policy))
    target = choose_device(device)
    place = choose_tier(tier)
    check_room(
        chosen,
        RunRequest(
            model=model_id,
            device=str(target),
            dtype=dtype,
            tier=place,
            paths=Path(paths) if paths else None,
            memory=memory,
        ),
        ONE_TOKEN,
    )
    use_threads(None, target)
    loaded = load_model(model_id, device=target, dtype=dtype, tier=place)
    check_shape(chosen.shape, loaded.shape)
    predictor = path_predictor(Path(paths) if paths else None, target, chosen.shape)
    machine = Machine(
        loaded,
        target,
        link=LinkSpec.parse(link) if link else None,
        tier=place,
        paths=predictor,
    )
    session = Session(
        loaded,
        machine.blocks,
        chosen.behaviour,
        target,
        link=machine.link,
        keep_log=False,
        paths=predictor,
    )
    handle = Offloaded(machine, session)
    _count_steps(loaded.model, session, handle)
    loaded.model.expertflow = handle
    weakref.finalize(loaded.model, session.store.close)
    return loaded.model


def _count_steps(model: Any, session: Session, handle: Offloaded) -> None:
    """Tell the session and the counters of each forward pass, whoever calls it."""
    passes = prompts = 0
    running: StepInfo | None = None

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes, prompts, running
        ids: torch.Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        shape = ids.shape if ids is not None else kwargs["inputs_embeds"].shape[:2]
        batch, query = int(shape[0]), int(shape[1])
        mask = kwargs.get("attention_mask")
        context = int(mask.shape[-1]) if isinstance(mask, torch.Tensor) else query
        prompts += batch if query > 1 else 0
        running = StepInfo(
            step=passes,
            phase="prefill" if query > 1 else "decode",
            batch=batch,
            tokens=batch * query,
            context=context,
        )
        session.begin_step(
            running,
            _fed(ids, mask, prompts) if ids is not None and session.reads_tokens else None,
        )
        passes += 1

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        assert running is not None
        handle.ended(running)

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


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
