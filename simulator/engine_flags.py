"""A policy as flags of other engines: the nearest placement each of them has, and what is lost.

None of them runs a policy's cache, predictor or scheduler; they place experts once. Names and meanings of flags are
those of the versions in docs/plan.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..tracer.errors import UsageError, unknown_name
from ..tracer.quantities import format_bytes
from ..tracer.types import ModelShape
from .policy.registry import allocations, caches
from .policy.spec import IN_ORDER, PolicyFile, PolicySpec

FLAGS_FORMAT = "expertflow.flags/1"
_EXPERT_TENSORS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
"""What llama.cpp itself looks for when it keeps experts on the CPU."""
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """Arguments for an engine's own command.

    `alternative` says the same in another way, where there is one. `gpu_experts` are those the engine then keeps on
    the device, of `slots` that the policy has; `lost` says in sentences what the engine does not do.
    """

    engine: str
    program: str
    model_id: str
    policy: str
    policy_hash: str
    slots: int
    gpu_experts: int
    flags: tuple[str, ...]
    alternative: tuple[str, ...]
    lost: tuple[str, ...]
    format: str = FLAGS_FORMAT


def engine_flags(policy: PolicyFile, engine: str) -> EngineFlags:
    """The flags that place a policy's slots on an engine.

    Raises UsageError for an unknown engine, or a model that these engines have no such flags for.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if len(policy.shape.stacks) > 1:
        raise UsageError(
            f"{policy.shape.model_id} has an encoder and a decoder; the offload flags of {engine} place the layers of "
            "decoders. Run it with `expertflow-trace deploy`."
        )
    return ENGINES[engine](policy)


def _llama_cpp(policy: PolicyFile) -> EngineFlags:
    spec, shape = policy.behaviour, policy.shape
    held = _slots_by_layer(spec, shape)
    whole = min(spec.slots, shape.total_experts) // shape.num_experts
    # Every layer demands top-k experts of each token, so which layers stay makes no difference to the bytes; those with
    # the most slots go first, then the last ones, as the short flag has it.
    is_even = max(held) - min(held) <= 1  # a remainder is no preference
    ranked = sorted(
        range(len(held)), key=lambda layer: (is_even or held[layer], layer), reverse=True
    )
    on_cpu = sorted(shape.moe_layers[layer] for layer in ranked[whole:])
    on_gpu = sorted(shape.moe_layers[layer] for layer in ranked[:whole])
    all_layers = ("--n-gpu-layers", "999")
    pattern = rf"blk\.({'|'.join(map(str, on_cpu))})\.{_EXPERT_TENSORS}=CPU"
    by_name = (*all_layers, "--override-tensor", pattern) if on_cpu else all_layers
    count = on_cpu[-1] + 1 if on_cpu else 0
    is_prefix = not on_gpu or count <= on_gpu[0]
    by_count = (*all_layers, "--n-cpu-moe", str(count))
    spare = min(spec.slots, shape.total_experts) - whole * shape.num_experts
    lost = [
        f"llama.cpp places the experts of whole layers: those of {whole} of {shape.num_moe_layers} layers stay on the "
        f"GPU, {format_bytes(spare * shape.expert_bytes)} of the policy's {spec.slots} slots stay unused.",
        "Experts that are not on the GPU are computed by the CPU; none is loaded when it is demanded.",
        f"Slots are counted at {format_bytes(shape.expert_bytes)} per expert ({shape.dtype}); a quantised GGUF is "
        "smaller, so more layers fit than these flags keep.",
        *_lost(spec),
    ]
    return _flags(
        policy,
        "llama.cpp",
        "llama-server",
        whole * shape.num_experts,
        by_count if is_prefix else by_name,
        by_name if is_prefix else (),
        lost,
    )


def _ktransformers(policy: PolicyFile) -> EngineFlags:
    spec, shape = policy.behaviour, policy.shape
    each = min(shape.num_experts, spec.slots // shape.num_moe_layers)
    held = set(_slots_by_layer(spec, shape))
    lost = [
        f"Every MoE layer gets {each} experts on the GPU"
        + ("" if held == {each} else ", where the policy divides its slots otherwise")
        + f": {each * shape.num_moe_layers} of {spec.slots} slots.",
        "Experts that are not on the GPU are computed by the CPU; none is loaded when it is demanded.",
    ]
    if spec.cache.name == "static":
        lost.append(
            "Which experts are popular is not told: its strategy `frequency` places them so, from a file that "
            "SGLang's own recorder writes (--init-expert-location)."
        )
    else:
        lost.append(
            "Its own --kt-enable-dynamic-expert-update changes the placement during long prefills; it is no cache "
            "and decides by other counts than this policy."
        )
    flags = (
        *("--kt-num-gpu-experts", str(each)),
        *("--kt-expert-placement-strategy", "uniform"),
    )
    share = math.floor(1e4 * each * shape.num_moe_layers / shape.total_experts) / 1e4
    return _flags(
        policy,
        "ktransformers",
        "python -m sglang.launch_server",
        each * shape.num_moe_layers,
        flags,
        ("--kt-gpu-experts-ratio", f"{share:.4f}", *flags[2:]),
        [*lost, *_lost(spec)],
    )


def _vllm(policy: PolicyFile) -> EngineFlags:
    spec, shape = policy.behaviour, policy.shape
    kept = min(spec.slots, shape.total_experts)
    moved = (shape.total_experts - kept) * shape.expert_bytes
    hundredths = -(-moved * 100 // _GIB)
    lost = [
        f"vLLM moves whole tensors, each with all experts of a layer, to the host until {format_bytes(moved)} are "
        "there, from the first layer on; which experts, it is not told.",
        "What lies on the host is read over the bus whenever it is used, and is never kept on the GPU: no hit is ever "
        "counted for it.",
        f"Sizes are those of {shape.dtype} weights; quantised ones are smaller.",
        *_lost(spec),
    ]
    flags = ("--cpu-offload-gb", f"{hundredths / 100:.2f}")
    if not moved:
        flags = ()
    return _flags(
        policy,
        "vllm",
        "vllm serve",
        kept,
        (*flags, "--cpu-offload-params", "experts") if flags else (),
        flags,
        lost,
    )


ENGINES: dict[str, Callable[[PolicyFile], EngineFlags]] = {
    "llama.cpp": _llama_cpp,
    "ktransformers": _ktransformers,
    "vllm": _vllm,
}


def _flags(
    policy: PolicyFile,
    engine: str,
    program: str,
    gpu_experts: int,
    flags: tuple[str, ...],
    alternative: tuple[str, ...],
    lost: Sequence[str],
) -> EngineFlags:
    return EngineFlags(
        engine=engine,
        program=program,
        model_id=policy.shape.model_id,
        policy=policy.behaviour.label,
        policy_hash=policy.behaviour_hash,
        slots=policy.behaviour.slots,
        gpu_experts=gpu_experts,
        flags=flags,
        alternative=alternative,
        lost=tuple(lost),
    )


def _slots_by_layer(spec: PolicySpec, shape: ModelShape) -> list[float]:
    """Slots of each MoE layer; layers that share a pool have equal parts of it."""
    shares = allocations.build(spec.allocation.name, dict(spec.allocation.params)).divide(
        shape.num_moe_layers, shape.num_experts, spec.slots
    )
    held = [0.0] * shape.num_moe_layers
    for share in shares:
        for layer in share.layers:
            held[layer] = share.slots / len(share.layers)
    return held


def _lost(spec: PolicySpec) -> list[str]:
    """What of a policy no such flag can say."""
    found: list[str] = []
    if "popularity" in caches.get(spec.cache.name).needs:
        found.append(
            f"Cache {spec.cache}: its choice of single experts is lost; experts of a layer stay or go together, or are "
            "chosen by the engine."
        )
    elif spec.cache.name != "none":
        found.append(
            f"Cache {spec.cache}: lost. The placement does not follow the text, so experts used again and again hit "
            "only if they happen to lie on the GPU."
        )
    if spec.predicts:
        found.append(f"Predictor {spec.predictor}: lost, nothing is prefetched.")
    if spec.scheduler != IN_ORDER:
        found.append(f"Scheduler {spec.scheduler}: lost, the engine batches by itself.")
    if spec.reroutes:
        found.append(f"Routing {spec.routing}: lost, the router's own choice is computed.")
    found.append("Speeds predicted for this policy do not hold there: measure the engine.")
    return found
