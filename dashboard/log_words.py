"""The decision log in words: why each expert was loaded, which one had to go, and whether it was missed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..simulator.policy.log import Entry
from ..tracer.types import ExpertKey

_OUTCOMES: Final[Mapping[str, tuple[str, str]]] = {
    "hit": ("hit", "hits"),
    "late": ("late (a prefetch still on its way)", "late (prefetches still on their way)"),
    "miss": ("miss", "misses"),
    "cpu": ("computed on the CPU", "computed on the CPU"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One load or one prefetch given up, with what became of whom it displaced."""

    layer: int
    what: str
    expert: int
    slot: int
    because: str
    evicted: str
    consequence: str


class Uses:
    """When each expert was demanded: passes in order, of the part of the run that the log covers."""

    def __init__(self, log: Iterable[Entry]) -> None:
        self._steps: dict[ExpertKey, list[int]] = {}
        for entry in log:
            if entry.kind == "event":
                steps = self._steps.setdefault(ExpertKey(entry.layer, entry.expert), [])
                if not steps or steps[-1] != entry.step:
                    steps.append(entry.step)

    def before(self, key: ExpertKey, step: int) -> int | None:
        """The last pass before `step` that demanded an expert."""
        steps = self._steps.get(key, [])
        place = bisect.bisect_left(steps, step)
        return steps[place - 1] if place else None

    def after(self, key: ExpertKey, step: int) -> int | None:
        """The first pass after `step` that demands an expert."""
        steps = self._steps.get(key, [])
        place = bisect.bisect_right(steps, step)
        return steps[place] if place < len(steps) else None


def story(
    entries: Sequence[Entry], uses: Uses, predictor: str, cache: str
) -> list[tuple[str, list[str]]]:
    """A pass in order: one sentence per layer event, and below it one per load or prefetch given up that followed."""
    found: list[tuple[str, list[str]]] = []
    asked: list[Entry] = []
    for entry in entries:
        if entry.kind == "event":
            if asked and asked[0].layer == entry.layer:
                asked.append(entry)
                found[-1] = (_event(entry.layer, asked), found[-1][1])
            else:
                asked = [entry]
                found.append((_event(entry.layer, asked), []))
        elif entry.kind in ("load", "cancel"):
            if not found:
                found.append(("Before the first layer.", []))
            for decision in decisions([entry], uses, predictor, cache):
                found[-1][1].append(in_words(decision))
    return found


def in_words(decision: Decision) -> str:
    """A decision as a sentence."""
    expert = f"Expert {decision.expert} of layer {decision.layer}"
    if decision.what == "prefetch given up":
        return f"{expert}: prefetch given up, because {decision.because}."
    text = f"{expert} loaded into slot {decision.slot}, because {decision.because}"
    if not decision.consequence:
        return f"{text}; {decision.evicted}."
    return f"{text}. It replaced {decision.evicted}; that one is {decision.consequence}."


def _event(layer: int, rows: Sequence[Entry]) -> str:
    found = [
        f"{len(some)} {_OUTCOMES[name][len(some) > 1]}"
        for name in _OUTCOMES
        if (some := [row for row in rows if row.detail == name])
    ]
    waves = len({row.wave for row in rows if row.wave >= 0})
    several = f", in {waves} waves because they do not fit at once" if waves > 1 else ""
    ids = [str(row.expert) for row in sorted(rows, key=lambda row: row.expert)]
    shown = ", ".join(ids[:12]) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
    experts = "expert" if len(ids) == 1 else "experts"
    return f"Layer {layer} asked for {experts} {shown}: {', '.join(found)}{several}."


def decisions(entries: Sequence[Entry], uses: Uses, predictor: str, cache: str) -> list[Decision]:
    """Loads and cancelled prefetches of a pass in order."""
    found: list[Decision] = []
    for entry in entries:
        if entry.kind == "load":
            found.append(_load(entry, uses, predictor, cache))
        elif entry.kind == "cancel":
            found.append(
                Decision(
                    layer=entry.layer,
                    what="prefetch given up",
                    expert=entry.expert,
                    slot=entry.slot,
                    because="its slot was needed for what the router asked for",
                    evicted="",
                    consequence="",
                )
            )
    return found


def _load(entry: Entry, uses: Uses, predictor: str, cache: str) -> Decision:
    reasons = {
        "demand": "the router chose it and it was not resident",
        "prefetch": f"{predictor} named it",
        "warm": f"{cache} begins with it",
    }
    evicted = consequence = ""
    if entry.evicted_expert >= 0:
        victim = ExpertKey(entry.evicted_layer, entry.evicted_expert)
        evicted = f"expert {victim.expert}"
        if victim.layer != entry.layer:
            evicted += f" of layer {victim.layer}"
        evicted += f", {_last(uses.before(victim, entry.step), entry.step)}"
        consequence = _next(uses.after(victim, entry.step), entry.step)
    return Decision(
        layer=entry.layer,
        what="demand load" if entry.detail == "demand" else entry.detail,
        expert=entry.expert,
        slot=entry.slot,
        because=reasons.get(entry.detail, entry.detail),
        evicted=evicted or "the slot was free",
        consequence=consequence,
    )


def _last(step: int | None, now: int) -> str:
    if step is None:
        return "not used so far"
    return f"last used {_passes(now - step)} before"


def _next(step: int | None, now: int) -> str:
    if step is None:
        return "not needed again here"
    return f"needed again {_passes(step - now)} later"


def _passes(count: int) -> str:
    return _count(count, "pass")


def _count(number: int, what: str) -> str:
    many = f"{what}es" if what.endswith(("s", "ch")) else f"{what}s"
    return f"{number} {what if number == 1 else many}"


def summary(found: Sequence[Decision]) -> str:
    """A pass's decisions in one sentence."""
    if not found:
        return "Nothing was loaded: all that was asked for was resident."
    loads = [d for d in found if d.what == "demand load"]
    ahead = [d for d in found if d.what == "prefetch"]
    given_up = sum(d.what == "prefetch given up" for d in found)
    soon = [d for d in found if d.consequence in ("needed again 1 pass later",)]
    texts = [_count(len(loads), "demand load"), _count(len(ahead), "prefetch")]
    if given_up:
        texts.append(f"{_count(given_up, 'prefetch')} given up")
    regret = f" {len(soon)} of the evicted were needed again in the very next pass." if soon else ""
    return f"{', '.join(texts)}.{regret}"
