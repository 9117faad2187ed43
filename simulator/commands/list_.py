"""`expertflow-trace list`: the policy members there are, and what each needs."""

from __future__ import annotations

from typing import Annotated

import typer

from ...tracer.console import print_json, print_rows


def list_members(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """List caches, allocations, predictors and schedulers.

    Example: expertflow-trace list
    """
    from ..policy.registry import FAMILIES

    families: dict[str, list[dict[str, object]]] = {}
    for family in FAMILIES:
        members = [(name, family.get(name)) for name in family.names()]
        families[family.kind] = [
            {
                "name": name,
                "doc": (member.__doc__ or "").strip().splitlines()[0],
                "needs": sorted(member.needs),
                "is_lossless": member.is_lossless,
                "is_bound": "future" in member.needs,
            }
            for name, member in members
        ]
    if as_json:
        print_json({"format": "expertflow.members/1", "families": families})
        return
    for kind, members in families.items():
        print_rows(kind, [(str(m["name"]), _line(m)) for m in members])


def _line(member: dict[str, object]) -> str:
    needs = member["needs"]
    notes = [f"needs {', '.join(needs)}"] if isinstance(needs, list) and needs else []
    if member["is_bound"]:
        notes.append("a bound, simulator only")
    notes.append("same text" if member["is_lossless"] else "LOSSY: may change the text")
    return f"{member['doc']} ({'; '.join(notes)})"
