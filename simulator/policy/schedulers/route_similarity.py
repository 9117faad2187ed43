"""Token scheduling by the routes of the tokens before."""

from __future__ import annotations

from typing import ClassVar

from ..similar import BySimilarity


class RouteSimilarity(BySimilarity):
    """Batches of sequences whose last tokens took similar routes; needs no training."""

    name: ClassVar[str] = "route_similarity"
    needs: ClassVar[frozenset[str]] = frozenset({"routing"})


MEMBER = RouteSimilarity
