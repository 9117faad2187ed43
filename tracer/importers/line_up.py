"""Tells requests apart by the positions of their tokens, in recordings that do not name them.

A server keeps its running requests in order: those that end leave, new ones join at the end. So the rows of a decode
pass are the running requests, some left out, each at the position after its last. Where none has left, that is
certain; where some have and others stand at the same position, it is the likeliest reading, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request in one pass; `sequence` is its number once it is known."""

    position: int
    length: int
    sequence: int = -1


@dataclass(slots=True, eq=False)
class _Member:
    sequence: int
    position: int


class Line:
    """The running requests, in order."""

    def __init__(self) -> None:
        self._running: list[_Member] = []
        self._unfinished: _Member | None = None
        self._count = 0
        self._unsure = 0
        self._unseen = 0
        self._cached = 0

    def prompts(self, pieces: Sequence[Piece], *, mixed: bool) -> Iterator[Piece]:
        """The pieces of a pass over prompts, or parts of them, each with its request's number.

        `mixed`: running requests take part, with one token each.
        """
        running = {member.position: member for member in reversed(self._running)} if mixed else {}
        chunk, self._unfinished = self._unfinished, None
        for piece in pieces:
            member = running.pop(piece.position, None) if piece.length == 1 else None
            if member is None:
                # Only the last prompt of a pass can have been cut by the server's limit of tokens.
                is_next = chunk is not None and chunk.position == piece.position
                member, chunk = (chunk, None) if is_next else (None, chunk)
                self._cached += member is None and piece.position > 0
                member = self._unfinished = self._joined(member)
            yield _sat(piece, member)

    def decoded(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces of a decode pass, one token each, each with its request's number."""
        running, first = self._running, 0
        has_left = len(pieces) < len(running)
        stay: list[_Member] = []
        for piece in pieces:
            fits = (n for n in range(first, len(running)) if running[n].position == piece.position)
            place = next(fits, None)
            if place is None:
                member = self._joined()
                self._unseen += 1
            else:
                member, first = running[place], place + 1
                self._unsure += has_left and next(fits, None) is not None
            stay.append(member)
            yield _sat(piece, member)
        self._running = stay

    def tell(self, warnings: list[str]) -> None:
        """Say how the requests were told apart."""
        words = f"Requests have no names here: {self._count:,} were told apart by positions"
        if self._unsure:
            words += f"; {self._unsure:,} rows could also belong to another one"
        if self._unseen:
            words += f"; of {self._unseen:,} the prompt was not recorded"
        if self._cached:
            words += (
                f"; of {self._cached:,} the prompt's beginning came from the server's prefix cache"
            )
        warnings.append(f"{words}.")

    def _joined(self, member: _Member | None = None) -> _Member:
        """A request at the end of the line: a new one, or one whose prompt goes on."""
        if member is None:
            member, self._count = _Member(self._count, 0), self._count + 1
        elif member in self._running:
            self._running.remove(member)
        self._running.append(member)
        return member


def _sat(piece: Piece, member: _Member) -> Piece:
    member.position = piece.position + piece.length
    return replace(piece, sequence=member.sequence)
