"""Token scheduling by predicted routes, as in ExpertFlow (He et al., arXiv 2410.17954)."""

from __future__ import annotations

from typing import ClassVar

from ..similar import BySimilarity


class PathSimilarity(BySimilarity):
    """Batches of sequences whose next tokens are predicted to take similar routes."""

    name: ClassVar[str] = "path_similarity"
    needs: ClassVar[frozenset[str]] = frozenset({"paths"})


MEMBER = PathSimilarity
