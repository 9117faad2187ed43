"""Cuts the held-out prompts: eight per domain, of spread lengths, from text never trained on.

No two prompts start alike and, as far as the text allows, no two come from one document: prompts
made from templates share prefixes, and shared prefixes make routing look more local than it is.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from corpus import CACHE, DOMAINS, write_lines
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TARGETS = (28, 40, 56, 76, 100, 128, 158, 190)
SHORTEST, LONGEST = 24, 200
FUNCTION_WORDS = {
    "english": re.compile(r"\b(the|of|and|to|an?|in|that|is|was|it|for|with|as|be|not|or|by)\b"),
    "french": re.compile(r"\b(les?|la|des?|du|et|à|une?|est|en|que|qui|pour|ce|par|l|d|sur)\b"),
    "spanish": re.compile(r"\b(el|l[ao]s?|del?|y|á|a|una?|es|en|que|se|por|para|con|su|no)\b"),
}
PROSE = frozenset(FUNCTION_WORDS)
SENTENCE_END = re.compile(r"(?<=[.!?])[ \n]+(?=[\"“«¿¡]?[A-ZÀ-Ý])|\n+")


def starts(domain: str, text: str) -> list[int]:
    """Where a prompt may begin: at a sentence in prose, at an unindented block elsewhere."""
    if domain in PROSE:
        found = [match.end() for match in SENTENCE_END.finditer(text)]
    else:
        found = [match.end() for match in re.finditer(r"\n\n(?=[^\s=\-*^~#.])", text)]
    return [0, *found]


def ends(domain: str, text: str, begin: int) -> list[int]:
    """Where it may end: after a sentence in prose, after a full line elsewhere."""
    pattern = SENTENCE_END if domain in PROSE else re.compile(r"\n+")
    return [match.start() for match in pattern.finditer(text, begin + 1, begin + 1200)]


def readable(domain: str, text: str) -> bool:
    """Prose must be words of its own language: no table, sample configuration or English list."""
    if domain not in PROSE:
        return True
    letters = sum(character.isalpha() or character in " ,;\n" for character in text)
    common = len(FUNCTION_WORDS[domain].findall(text.lower())) / len(text.split())
    return letters > 0.93 * len(text) and common > 0.18 and text[-1] in ".!?:;»”"


def cut(
    domain: str, text: str, begin: int, target: int, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """The passage from `begin` whose length is nearest to `target` tokens, if it is near enough."""
    best: tuple[int, str] | None = None
    for end in ends(domain, text, begin):
        passage = text[begin:end].rstrip()
        count = len(tokenizer(passage)["input_ids"])
        if count > LONGEST:
            break
        distance = abs(count - target)
        if count >= SHORTEST and (best is None or distance < best[0]):
            best = (distance, passage)
    if best is None or best[0] > 0.25 * target or not readable(domain, best[1]):
        return None
    return best[1]


def choose(
    domain: str,
    documents: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    dice: random.Random,
    prefixes: set[str],
) -> list[dict[str, str]]:
    """One prompt for each target length, each from another document while there are enough."""
    rows: list[dict[str, str]] = []
    order = dice.sample(documents, len(documents))
    for number, target in enumerate(TARGETS):
        for document in order:
            places = starts(domain, document["text"])
            tries = dice.sample(places, min(40, len(places)))
            cuts = (cut(domain, document["text"], place, target, tokenizer) for place in tries)
            text = next((c for c in cuts if c and c[:10].lower() not in prefixes), None)
            if text:
                prefixes.add(text[:10].lower())
                rows.append({"id": f"{domain}-{number + 1}", "domain": domain, "text": text})
                order.append(order.pop(order.index(document)))
                break
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="prompts.jsonl to write")
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lines = (arguments.cache / "text" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    dice, prefixes, rows = random.Random(arguments.seed), set[str](), []
    for domain in DOMAINS:
        documents = [document for document in found if document["domain"] == domain]
        rows += choose(domain, documents, tokenizer, dice, prefixes)
    write_lines(arguments.out, rows)
    print(len(rows), "prompts,", sorted(len(tokenizer(row["text"])["input_ids"]) for row in rows))


if __name__ == "__main__":
    main()
