"""`expertflow-trace export-flags`: a policy as flags of other engines."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from ...tracer.commands.options import Json, PolicyPath, ResultOut
from ...tracer.console import print_json, print_rows


def export_flags(
    policy: PolicyPath,
    engine: Annotated[str, typer.Option(help="llama.cpp, ktransformers or vllm.")],
    out: ResultOut = None,
    as_json: Json = False,
) -> None:
    """Say a policy in the flags of llama.cpp, KTransformers or vLLM, and what is lost.

    Example: expertflow-trace export-flags traces/demo/policy.json --engine llama.cpp
    """
    from ...tracer.records import write_json
    from ..engine_flags import engine_flags
    from ..policy.spec import read_policy

    found = engine_flags(read_policy(policy), engine)
    if out is not None:
        write_json(out, found)
    if as_json:
        print_json(found)
        return
    rows = [("flags", f"{found.program} … {shlex.join(found.flags)}".rstrip())]
    if found.alternative:
        rows.append(("or", f"{found.program} … {shlex.join(found.alternative)}"))
    rows.append(("on the GPU", f"{found.gpu_experts} experts of the policy's {found.slots} slots"))
    rows += [("lost", words) for words in found.lost]
    print_rows(f"{found.policy} on {found.engine}", rows)
