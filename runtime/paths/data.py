"""What a trace teaches about paths: tokens with their experts in every layer, prompts split for learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...simulator.paths import Part, PromptPart
from ...tracer.errors import UsageError
from ...tracer.store import NO_EXPERT, Trace

_PARTS = {"train": "training", "validation": "validation", "held_out": "the verdict"}
_CHUNK = 8
"""Batches of training that are sorted by length together, so that little is padded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """Tokens of all sequences in order, each with its experts: `experts` [tokens, layers, top_k].

    Sequence i, whose number is `number[i]`, has the tokens `first[i]` to `first[i + 1]`; the prompt's end at
    `decode[i]`. Where a layer's row was not recorded its experts are NO_EXPERT.
    """

    position: np.ndarray
    token: np.ndarray
    experts: np.ndarray
    number: np.ndarray
    first: np.ndarray
    decode: np.ndarray
    num_experts: int

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return self.experts.shape[2]

    def sequence_of(self) -> np.ndarray:
        """Place of each token's sequence: [tokens]."""
        return np.repeat(np.arange(len(self.number)), np.diff(self.first))

    def tokens_of(self, sequences: np.ndarray) -> np.ndarray:
        """Places of all tokens of the sequences at these places."""
        return np.flatnonzero(np.isin(self.sequence_of(), sequences))

    def is_decode(self) -> np.ndarray:
        """Whether each token was fed after the prompt: [tokens]."""
        return np.arange(len(self.token)) >= self.decode[self.sequence_of()]


def routed(trace: Trace) -> Routed:
    """Read a trace's tokens. Raises UsageError if it does not hold what paths are learned from."""
    found = trace.routing_arrays()
    rows = np.flatnonzero(~found.is_pad & (found.position >= 0))
    if not len(rows):
        raise UsageError(f"{trace.path} holds no routing rows; paths cannot be learned from it.")
    if (found.token_id[rows] < 0).any():
        raise UsageError(
            f"{trace.path} holds no token ids (they were redacted, or never known), and a path predictor "
            "reads tokens. Record the trace again with `expertflow-trace run`, without --redact."
        )
    if found.phase_is_decode[rows].all():
        raise UsageError(
            f"{trace.path} holds decode steps only, and a path predictor reads the prompt. "
            "Record prompts too, with `expertflow-trace run`."
        )
    if not found.phase_is_decode[rows].any():
        raise UsageError(
            f"{trace.path} holds prompts only, and paths of generated tokens are what is predicted. "
            "Record it again with --max-new-tokens above 1."
        )
    span = np.int64(found.position.max()) + 1
    keys, first_row, token = np.unique(
        found.sequence[rows] * span + found.position[rows], return_index=True, return_inverse=True
    )
    shape = trace.shape
    experts = np.full((len(keys), shape.num_moe_layers, shape.top_k), NO_EXPERT, np.uint16)
    experts[token, found.layer[rows]] = found.experts[rows]
    sequence, position = np.divmod(keys, span)
    number, first = np.unique(sequence, return_index=True)
    first = np.append(first, len(keys))
    decode = found.phase_is_decode[rows][first_row]
    prompts = np.add.reduceat(~decode, first[:-1])
    return Routed(
        position=position,
        token=found.token_id[rows][first_row].astype(np.int64),
        experts=experts,
        number=number,
        first=first,
        decode=first[:-1] + prompts,
        num_experts=shape.num_experts,
    )


@dataclass(frozen=True, slots=True)
class Split:
    """Prompts by part, and the sequences that ran them: places in Routed, by part."""

    prompts: tuple[PromptPart, ...]
    sequences: Mapping[str, np.ndarray] = field(default_factory=dict)


def split(
    trace: Trace,
    found: Routed,
    *,
    hold_out: float,
    validation: float,
    seed: int,
    cross_domain: str | None = None,
) -> Split:
    """Split by prompt: equal prompts stay together, every domain gives its share.

    Prompts of `cross_domain` are all held out. Raises UsageError if a part would be empty.
    """
    if not (0 < hold_out < 1 and 0 < validation < 1 and hold_out + validation < 1):
        raise UsageError(
            f"--hold-out {hold_out} and --validation {validation} must be above 0 and leave prompts to learn from."
        )
    names = ["sequence", "prompt_id", "domain", "prompt_sha256"]
    table = trace.table("sequences", columns=names).to_pydict()
    has_prompt = found.decode > found.first[:-1]
    place_of = {int(n): place for place, n in enumerate(found.number) if has_prompt[place]}
    prompts: dict[str, tuple[str, str]] = {}
    runs: dict[str, list[int]] = {}
    for number, name, domain, sha256 in zip(*(table[name] for name in names), strict=True):
        if number in place_of:
            key = sha256 or f"sequence {number}"
            prompts.setdefault(key, (name, domain))
            runs.setdefault(key, []).append(place_of[number])
    domains = {domain for _, domain in prompts.values()}
    if cross_domain is not None and cross_domain not in domains:
        raise UsageError(
            f"No prompt has the domain {cross_domain!r}; this trace has: {', '.join(sorted(domains))}."
        )
    part_of = _parts(prompts, hold_out, validation, seed, cross_domain)
    parts = tuple(
        PromptPart(name, key, domain, part_of[key]) for key, (name, domain) in prompts.items()
    )
    sequences = {
        part: np.array(
            sorted(p for key in runs if part_of[key] == part for p in runs[key]), dtype=np.int64
        )
        for part in _PARTS
    }
    for part, places in sequences.items():
        if not len(places):
            raise UsageError(
                f"{trace.path} has {len(prompts)} different prompts, too few to leave some for {_PARTS[part]}. "
                "Trace more prompts (a few hundred are a good start)."
            )
    return Split(parts, sequences)


def _parts(
    prompts: Mapping[str, tuple[str, str]],
    hold_out: float,
    validation: float,
    seed: int,
    cross_domain: str | None,
) -> dict[str, Part]:
    draw = np.random.default_rng(seed)
    part_of: dict[str, Part] = {}
    shares: tuple[tuple[Part, float], ...] = (("held_out", hold_out), ("validation", validation))
    owed = dict.fromkeys((part for part, _ in shares), 0.0)
    for domain in sorted({domain for _, domain in prompts.values()}):
        keys = sorted(key for key, (_, own) in prompts.items() if own == domain)
        draw.shuffle(keys)
        if domain == cross_domain:
            part_of.update((key, "held_out") for key in keys)
            continue
        taken = 0
        for part, share in shares:
            # What rounding leaves is carried to the next domain.
            owed[part] += share * len(keys)
            count = min(len(keys) - taken, max(0, int(owed[part] + 0.5)))
            owed[part] -= count
            part_of.update((key, part) for key in keys[taken : taken + count])
            taken += count
        part_of.update((key, "train") for key in keys[taken:])
    return part_of


@dataclass(frozen=True, slots=True)
class PathBatch:
    """Sequences side by side, right-padded: tokens [batch, tokens] and their places in Routed (−1: padding).

    `prompt` holds the last tokens of the prompts, `fed` the tokens after them.
    """

    prompt: torch.Tensor
    is_real: torch.Tensor
    prompt_place: np.ndarray
    fed: torch.Tensor
    fed_place: np.ndarray

    def to(self, device: torch.device) -> PathBatch:
        """The same with its tensors on a device."""
        return PathBatch(
            self.prompt.to(device),
            self.is_real.to(device),
            self.prompt_place,
            self.fed.to(device),
            self.fed_place,
        )


def path_batch(found: Routed, sequences: Sequence[int], window: int) -> PathBatch:
    """Put sequences side by side; of a prompt, the last `window` tokens."""
    prompts: list[np.ndarray] = []
    fed: list[np.ndarray] = []
    for place in sequences:
        first, decode, last = found.first[place], found.decode[place], found.first[place + 1]
        prompts.append(np.arange(max(first, decode - window), decode))
        fed.append(np.arange(decode, last))
    prompt_place, fed_place = _padded(prompts), _padded(fed)
    return PathBatch(
        prompt=torch.from_numpy(np.where(prompt_place < 0, 0, found.token[prompt_place])),
        is_real=torch.from_numpy(prompt_place >= 0),
        prompt_place=prompt_place,
        fed=torch.from_numpy(np.where(fed_place < 0, 0, found.token[fed_place])),
        fed_place=fed_place,
    )


def targets(found: Routed, place: np.ndarray) -> torch.Tensor:
    """Experts of the tokens at `place` [...]: [..., layers, top_k], NO_EXPERT for padding."""
    experts = found.experts[place].astype(np.int64)
    experts[place < 0] = NO_EXPERT
    return torch.from_numpy(experts)


def shuffled(
    found: Routed, sequences: np.ndarray, batch_size: int, draw: np.random.Generator
) -> Iterator[list[int]]:
    """Batches of sequences in random order, of like length within a batch."""
    order = draw.permutation(sequences)
    length = np.diff(found.first)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * _CHUNK):
        chunk = order[start : start + batch_size * _CHUNK]
        chunk = chunk[np.argsort(length[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size].tolist() for i in range(0, len(chunk), batch_size)]
    for number in draw.permutation(len(batches)):
        yield batches[number]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), width), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
