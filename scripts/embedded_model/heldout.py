"""Picks the small held-out sample that ships with the model, so that its metrics can be redone.

The full held-out text is too large for the package; this takes the same number of bytes from every
domain, spread over all its held-out documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus import CACHE, DOMAINS, write_lines

DOMAIN_BYTES = 46_000


def shorten(text: str, limit: int) -> str:
    """The start of a text up to `limit` bytes, ending at a line or, failing that, at a space."""
    if len(text.encode()) <= limit:
        return text
    head = text.encode()[:limit].decode("utf-8", "ignore")
    end = max(head.rfind("\n"), 0) or head.rfind(" ")
    return head[:end]


def pick(documents: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """An even share of every document; what short ones leave over goes to the longer ones."""
    out, left = [], limit
    by_size = sorted(documents, key=lambda document: len(document["text"]))
    for index, document in enumerate(by_size):
        text = shorten(document["text"], left // (len(by_size) - index))
        left -= len(text.encode())
        out.append({**document, "text": text})
    return [row for row in out if row["text"]]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, required=True, help="heldout.jsonl to write")
    arguments = parser.parse_args()
    lines = (arguments.cache / "text" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    rows: list[dict[str, str]] = []
    for domain in DOMAINS:
        rows += pick([row for row in found if row["domain"] == domain], DOMAIN_BYTES)
    write_lines(arguments.out, rows)
    print(len(rows), "documents,", arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
