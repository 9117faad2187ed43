"""Counts how much of the held-out text also occurs in the training text of its domain.

Documents are split whole, but manuals and theorem lists repeat phrases. The share of held-out runs
of ten words that training text also has says how far the held-out numbers can be trusted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from corpus import CACHE

RUN = 10


def runs(text: str) -> set[int]:
    """Hashes of every run of ten words."""
    words = text.split()
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def runs_by_domain(path: Path) -> dict[str, set[int]]:
    """The runs of a file of documents."""
    found: dict[str, set[int]] = defaultdict(set)
    with path.open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            found[document["domain"]] |= runs(document["text"])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    folder = parser.parse_args().cache / "text"
    train, heldout = (runs_by_domain(folder / f"{name}.jsonl") for name in ("train", "heldout"))
    shares = {name: round(len(own & train[name]) / len(own), 4) for name, own in heldout.items()}
    (folder / "overlap.json").write_text(json.dumps(shares) + "\n", encoding="utf-8")
    print(shares)


if __name__ == "__main__":
    main()
