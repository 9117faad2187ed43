"""Every token goes where its router sent it."""

from __future__ import annotations

from typing import ClassVar

from ..base import GateScores, Routed


class AsRouted:
    """Leave the router's choice alone."""

    name: ClassVar[str] = "as_routed"
    needs: ClassVar[frozenset[str]] = frozenset()
    is_lossless: ClassVar[bool] = True

    def route(self, said: GateScores) -> Routed:
        return Routed([said.chosen(token) for token in range(len(said))], said.weights)


MEMBER = AsRouted
