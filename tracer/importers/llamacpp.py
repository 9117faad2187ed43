"""Routing of llama.cpp's evaluation callback (tensors `ffn_moe_topk-N`), as CSV or JSON lines.

- `layer,expert`: one line per routed choice, with or without that header (ggml-org/llama.cpp, pull request 28544,
  `examples/moe-trace`). A callback writes one layer of one pass: all its tokens, k choices each.
- The same with `phase`, `token` and `rank` beside them (a fork's `phase,token,layer,rank,expert`).
- `layer_id,expert_ids` or JSON lines {"layer": 3, "experts": [..]}: one line per token and layer; JSON lines
  {"layer": 3, "expert": 7} and [3, 7]: one per choice.

Known traps: passes and sequences have no marks; the last layer computes only tokens whose logits are wanted; the
warm-up pass takes every expert; a reader that ignores the view's strides writes nonsense for all but the first token.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from .mend import checked
from .request import ImportRequest, refuse
from .responses import Replies
from .sequences import Sequences

LAYER = ("layer", "layer_id")
EXPERT = ("expert", "expert_id")
EXPERTS = ("experts", "expert_ids")


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: a layer and some choices; what a line does not tell is None."""

    number: int
    layer: int
    experts: tuple[int, ...]
    phase: str | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of one pass: the choices of all its tokens, in order, flat."""

    line: int
    layer: int
    ids: np.ndarray
    phase: str | None
    width: int | None


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass: ids [tokens, layers, k], and the line it starts at."""

    line: int
    ids: np.ndarray
    is_decode: bool


def read_llamacpp(request: ImportRequest, warnings: list[str]) -> Replies:
    """Read a log of choices. Raises InputError naming the line that is wrong."""
    refuse(request, "a log of llama.cpp", "--layout", "--domain", "--layers", "--phase")
    path = request.file
    runs = list(_runs(_lines_of(path)))
    if not runs:
        raise InputError(f"{path} holds no line with a layer and an expert.")
    layers = sorted({run.layer for run in runs})
    if len(layers) == 1:
        raise InputError(
            f"{path} is of layer {layers[0]} alone, so nothing tells its passes apart; record all layers."
        )
    groups = _without_warm_up(list(_groups(runs)), warnings)
    top_k = _top_k(request, groups, warnings)
    passes = list(_passes(path, groups, layers, top_k, warnings))
    passes = _without_strided(passes, top_k, warnings)
    return _replies(path, passes, layers, warnings)


def _lines_of(path: Path) -> Iterator[_Line]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = (line.rstrip("\r\n") for line in file)
            numbered = [(n, line) for n, line in enumerate(rows, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as text: {error}.") from None
    is_json = bool(numbered) and numbered[0][1].lstrip()[0] in "{["
    return _json_lines(path, numbered) if is_json else _csv_lines(path, numbered)


def _json_lines(path: Path, numbered: Iterable[tuple[int, str]]) -> Iterator[_Line]:
    for number, text in numbered:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}).") from None
        if isinstance(found, list) and len(found) == 2:
            found = {"layer": found[0], "expert": found[1]}
        if not isinstance(found, Mapping):
            raise InputError(f"{path}: line {number} is no pair of a layer and an expert.")
        yield _line(path, number, found)


def _csv_lines(path: Path, numbered: list[tuple[int, str]]) -> Iterator[_Line]:
    rows = csv.reader(text for _, text in numbered)
    header = ["layer", "expert"]
    for (number, _), cells in zip(numbered, rows, strict=False):
        values = [cell.strip() for cell in cells]
        if number == numbered[0][0] and not values[0].lstrip("-").isdigit():
            header = [value.lower() for value in values]
            _require_header(path, header)
            continue
        if len(values) != len(header):
            raise InputError(
                f"{path}: line {number} has {len(values)} cells; expected {len(header)}: "
                f"{', '.join(header)}."
            )
        yield _line(path, number, dict(zip(header, values, strict=True)))


def _require_header(path: Path, header: Sequence[str]) -> None:
    if "count" in header:
        raise InputError(
            f"{path} holds counts by expert ({', '.join(header)}), not which token chose what when; "
            "record single choices (`layer,expert`)."
        )
    if not set(header) & set(LAYER) or not set(header) & {*EXPERT, *EXPERTS}:
        raise InputError(
            f"{path}: its columns are {', '.join(header)}; expected layer and expert at least."
        )


def _line(path: Path, number: int, cells: Mapping[str, Any]) -> _Line:
    def found(names: Sequence[str]) -> Any:
        return next((cells[name] for name in names if name in cells), None)

    several, one = found(EXPERTS), found(EXPERT)
    choices = several.split() if isinstance(several, str) else several
    choices = [one] if choices is None else choices
    rank = found(("rank",))
    try:
        layer, ids = _whole(found(LAYER)), tuple(_whole(choice) for choice in choices)
        place = None if rank is None else _whole(rank)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: line {number} is {dict(cells)}; expected a layer and an expert, whole numbers from 0."
        ) from None
    if not ids:
        raise InputError(f"{path}: line {number} names no expert.")
    phase = found(("phase",))
    if phase not in (None, "prefill", "decode"):
        raise InputError(f"{path}: line {number}: phase {phase!r}; expected prefill or decode.")
    return _Line(number, layer, ids, phase, place)


def _whole(value: Any) -> int:
    if isinstance(value, (bool, float)) or value is None:
        raise ValueError(value)
    number = int(value)
    if number < 0:
        raise ValueError(value)
    return number


def _runs(lines: Iterable[_Line]) -> Iterator[_Layer]:
    """Lines of one layer that follow each other: what one callback wrote."""
    for (layer, phase), group in groupby(lines, key=lambda line: (line.layer, line.phase)):
        found = list(group)
        ids = np.asarray([expert for line in found for expert in line.experts], dtype=np.int64)
        ranks = [line.rank for line in found if line.rank is not None]
        several = {len(line.experts) for line in found} - {1}
        width = max(ranks) + 1 if ranks else several.pop() if len(several) == 1 else None
        yield _Layer(found[0].number, layer, ids, phase, width)


def _groups(runs: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """Runs of one forward pass: layers ascend within it."""
    group: list[_Layer] = []
    for run in runs:
        if group and run.layer <= group[-1].layer:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _without_warm_up(groups: list[list[_Layer]], warnings: list[str]) -> list[list[_Layer]]:
    """Without the first pass if each of its tokens takes every expert: llama.cpp warms up so."""
    if len(groups) < 2:
        return groups
    experts = 1 + max(int(run.ids.max()) for group in groups for run in group)
    is_smaller = any(len(run.ids) % experts for group in groups[1:] for run in group)
    if is_smaller and all(_is_every_expert(run.ids, experts) for run in groups[0]):
        warnings.append(
            f"Left out the first pass: each token takes all {experts} experts, as in a warm-up."
        )
        return groups[1:]
    return groups


def _is_every_expert(ids: np.ndarray, experts: int) -> bool:
    if len(ids) % experts:
        return False
    return bool((np.sort(ids.reshape(-1, experts), axis=1) == np.arange(experts)).all())


def _top_k(request: ImportRequest, groups: Sequence[list[_Layer]], warnings: list[str]) -> int:
    """Experts per token: told, or what divides every pass."""
    known = {run.width for group in groups for run in group if run.width is not None}
    if len(known) > 1 and request.top_k is None:
        raise InputError(
            f"{request.file}: tokens take {sorted(known)} experts; expected one number."
        )
    if known and request.top_k not in (None, *known):
        raise UsageError(f"--top-k is {request.top_k}, but {request.file} says {known.pop()}.")
    if request.top_k is not None:
        return request.top_k
    if known:
        return known.pop()
    guess = gcd(*(len(run.ids) for group in groups for run in group))
    warnings.append(
        f"The number of experts per token, {guess}, is guessed: it divides the lines of every pass. Give it "
        "with --top-k."
    )
    return guess


def _passes(
    path: Path,
    groups: Sequence[list[_Layer]],
    layers: Sequence[int],
    top_k: int,
    warnings: list[str],
) -> Iterator[_Pass]:
    """Passes with as many rows in every layer."""
    repeated, merged = 0, 0
    held: list[list[_Layer]] = []
    for group in groups:
        held.append(group)
        # A part of a prompt whose logits nobody wants has no last layer; the prompt's last part has one.
        if [run.layer for run in group] == list(layers[:-1]) and group is not groups[-1]:
            merged += 1
            continue
        blocks = _blocks(path, held, layers, top_k)
        tokens = len(blocks[0])
        if len(blocks[-1]) < tokens:
            blocks[-1] = np.concatenate([_repeated(blocks[-1], tokens), blocks[-1]])
            repeated += 1
        phases = {run.phase for part in held for run in part}
        is_decode = phases == {"decode"} or (phases == {None} and tokens == 1)
        yield _Pass(held[0][0].line, np.stack(blocks, axis=1), is_decode)
        held = []
    if repeated:
        warnings.append(
            f"The last layer lacks rows in {repeated:,} passes: llama.cpp computes it only for tokens whose "
            "logits are wanted. Recorded rows stand in for the missing ones, so that the experts it "
            "demands are those recorded."
        )
    if merged:
        warnings.append(
            f"{merged:,} parts of prompts have no last layer; each was joined to the next part."
        )


def _blocks(
    path: Path, held: Sequence[list[_Layer]], layers: Sequence[int], top_k: int
) -> list[np.ndarray]:
    """Ids of each layer [rows, k] of one pass, or of parts of one prompt."""
    blocks: list[np.ndarray] = []
    for layer in layers:
        runs = [run for part in held for run in part if run.layer == layer]
        line = held[-1][0].line
        if not runs:
            raise InputError(f"{path}: the pass that starts at line {line} lacks layer {layer}.")
        for run in runs:
            if len(run.ids) % top_k:
                raise InputError(
                    f"{path}: layer {layer} at line {run.line} has {len(run.ids)} choices; expected a "
                    f"multiple of {top_k}. Is --top-k right?"
                )
        blocks.append(np.concatenate([run.ids for run in runs]).reshape(-1, top_k))
    for layer, block in zip(layers, blocks, strict=True):
        is_last = layer == layers[-1]
        if len(block) != len(blocks[0]) and not (is_last and len(block) < len(blocks[0])):
            raise InputError(
                f"{path}: the pass that starts at line {held[0][0].line} has {len(block)} tokens in layer "
                f"{layer} and {len(blocks[0])} in layer {layers[0]}; expected as many."
            )
    return blocks


def _repeated(block: np.ndarray, tokens: int) -> np.ndarray:
    missing = tokens - len(block)
    return block[np.arange(missing) % len(block)]


def _without_strided(passes: list[_Pass], top_k: int, warnings: list[str]) -> list[_Pass]:
    """Without prompts whose first tokens share no expert in any layer, where chance forbids that.

    A reader that ignores strides takes the tail of the first token's ranking for the next tokens' choices.
    """
    experts = 1 + max(int(found.ids.max()) for found in passes)
    kept = [found for found in passes if not _is_strided(found.ids, top_k, experts)]
    wrong = len(passes) - len(kept)
    if wrong:
        warnings.append(
            f"Left out {wrong:,} passes over prompts whose tokens share no expert in any layer: their ids were "
            "read without the tensor's strides and are wrong from the second token on. Record them again."
        )
    return kept


def _is_strided(ids: np.ndarray, top_k: int, experts: int) -> bool:
    tokens = min(len(ids), experts // top_k)
    if tokens < 2:
        return False
    first = np.sort(ids[:tokens].swapaxes(0, 1).reshape(ids.shape[1], -1)[:, : tokens * top_k])
    if (first[:, 1:] == first[:, :-1]).any():
        return False
    chances = 1 - np.arange(tokens)[:, None] * top_k / (experts - np.arange(top_k))
    return float(np.log(np.maximum(chances, 1e-9)).sum()) * ids.shape[1] < np.log(1e-6)


def _replies(
    path: Path, passes: list[_Pass], layers: Sequence[int], warnings: list[str]
) -> Replies:
    if not passes:
        raise InputError(f"{path}: no pass is left to import; record it again.")
    sizes = np.asarray([len(found.ids) for found in passes])
    starts = np.r_[0, np.cumsum(sizes)]

    def place(token: int) -> str:
        number = int(np.searchsorted(starts, token, side="right")) - 1
        return f"token {token - starts[number]} of the pass at line {passes[number].line}"

    ids = np.concatenate([found.ids for found in passes])
    experts, _ = checked(path, ids, None, warnings, name="the log", place=place)
    # Parts of one prompt were joined for want of a last layer, so every other prompt begins a sequence.
    is_decode = np.asarray([found.is_decode for found in passes])
    begins = ~is_decode
    begins[0] = True
    sequence = np.cumsum(begins) - 1
    lengths = np.bincount(sequence, sizes).astype(np.int64)
    prompts = np.bincount(sequence, sizes * ~is_decode).astype(np.int64)
    count = len(lengths)
    warnings.append(
        f"The log marks no sequences: it is read as {count:,}, each beginning with a pass of several tokens."
    )
    return Replies(
        Sequences(
            experts=experts,
            weights=None,
            bounds=np.r_[0, np.cumsum(lengths)],
            prompts=prompts,
            prompt_ids=tuple(str(number) for number in range(count)),
            domains=("",) * count,
        ),
        tuple(layers),
        max(layers) + 1,
    )
