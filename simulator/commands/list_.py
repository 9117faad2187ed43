"""`expertflow-trace list`: the policy members there are, what each needs, and the declared hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...tracer.console import print_json, print_rows

if TYPE_CHECKING:
    from ..policy.registry import Registry

_TAUGHT = {"cpu_times": ("copy_s", "expert_s", "token_s")}
"""Parameters by need where they are not called like it; a trace or a machine fills them."""

_SCOPE_NOTE = (
    "slots are per layer (--scope layer, --allocation equal) unless you ask for --scope global"
)


def list_members(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """List caches, allocations, predictors, schedulers, answers to misses, routings, and declared hardware.

    A star marks the member that is used where none is named.

    Example: expertflow-trace list
    """
    import importlib.util

    from ..hardware_profiles import GPUS, LINKS
    from ..policy.registry import FAMILIES
    from ..scope import SCOPES

    has_numba = importlib.util.find_spec("numba") is not None
    families = {
        family.kind: [_member(family, name) for name in family.names()] for family in FAMILIES
    }
    hardware = {
        "links": [
            {
                "name": link.name,
                "bandwidth_Bps": link.bandwidth_Bps,
                "latency_s": link.latency_s,
                "source": link.source,
            }
            for link in LINKS.values()
        ],
        "gpus": [
            {
                "name": gpu.name,
                "memory_Bps": gpu.memory_Bps,
                "flops": gpu.flops,
                "memory_bytes": gpu.memory_bytes,
                "source": gpu.source,
            }
            for gpu in GPUS.values()
        ],
    }
    if as_json:
        print_json(
            {
                "format": "expertflow.members/1",
                "families": families,
                "default_scope": "layer",
                "scopes": SCOPES,
                "has_compiled_engine": has_numba,
                "hardware": hardware,
            }
        )
        return
    for kind, members in families.items():
        title = f"{kind} — {_SCOPE_NOTE}" if kind == "allocation" else kind
        rows = [(_starred(member), _line(member, has_engine=has_numba)) for member in members]
        print_rows(title, rows)
    _print_hardware(hardware)
    engine = (
        "compiled, and the reference engine for members without a compiled twin"
        if has_numba
        else "reference; the compiled one needs numba: pip install 'expertflow-trace[fast]'"
    )
    print_rows("engine", [("simulator", engine)])


def _member(family: Registry, name: str) -> dict[str, Any]:
    from ..space import DEFAULTS

    member = family.get(name)
    is_bound = "future" in member.needs
    return {
        "name": name,
        "doc": ((member.__doc__ or "").strip().splitlines() or [""])[0],
        "needs": sorted(member.needs),
        "is_lossless": member.is_lossless,
        "is_bound": is_bound,
        "params": _params(member),
        "engine": "compiled" if _runs_compiled(family, name) else "reference",
        "is_deployable": not is_bound,
        "is_default": name == DEFAULTS[family.kind],
    }


def _params(member: type) -> list[dict[str, Any]]:
    """Parameters people set; what `needs` brings is left out."""
    import inspect

    taught = {name for need in member.needs for name in _TAUGHT.get(need, (need,))}
    return [
        {
            "name": name,
            "default": None if found.default is found.empty else found.default,
            "is_required": found.default is found.empty,
        }
        for name, found in inspect.signature(member).parameters.items()
        if name not in taught and found.kind not in (found.VAR_POSITIONAL, found.VAR_KEYWORD)
    ]


def _runs_compiled(family: Registry, name: str) -> bool:
    """Whether the compiled engine can take a member; those that touch no slots run before its clock starts."""
    import importlib.util

    if importlib.util.find_spec("numba") is None:
        return False
    from ..compiled.state import KINDS, MISSES

    twins = {"cache": KINDS, "misses": MISSES}
    if family.kind not in twins:
        return not hasattr(family.get(name), "hear")
    return name in twins[family.kind] and family.get(name).__module__.startswith(family.package)


def _starred(member: Mapping[str, Any]) -> str:
    return f"{member['name']} *" if member["is_default"] else str(member["name"])


def _line(member: Mapping[str, Any], *, has_engine: bool) -> str:
    notes = []
    if member["params"]:
        notes.append(", ".join(_param_text(param) for param in member["params"]))
    if member["needs"]:
        notes.append(f"needs {', '.join(member['needs'])}")
    if member["is_bound"]:
        notes.append("a bound, simulator only")
    if has_engine and member["engine"] == "reference":
        notes.append("runs on the reference engine")
    notes.append("same text" if member["is_lossless"] else "LOSSY: may change the text")
    return f"{member['doc']} ({'; '.join(notes)})"


def _param_text(param: Mapping[str, Any]) -> str:
    if param["is_required"]:
        return f"{param['name']} to be given"
    default = param["default"]
    return (
        f"{param['name']}={default:.3g}"
        if isinstance(default, float)
        else f"{param['name']}={default}"
    )


def _print_hardware(hardware: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from ...tracer.quantities import format_bytes, format_seconds

    links = [
        (
            str(link["name"]),
            f"{format_bytes(link['bandwidth_Bps'])}/s + {format_seconds(link['latency_s'])} ({link['source']})",
        )
        for link in hardware["links"]
    ]
    gpus = [
        (
            str(gpu["name"]),
            f"{format_bytes(gpu['memory_Bps'])}/s, {gpu['flops'] / 1e12:g} TFLOP/s, "
            f"{gpu['memory_bytes'] >> 30} GiB ({gpu['source']})",
        )
        for gpu in hardware["gpus"]
    ]
    print_rows("hardware: links (--link), declared by their makers, not measured", links)
    print_rows("hardware: GPUs (--gpu), declared by their makers, not measured", gpus)
