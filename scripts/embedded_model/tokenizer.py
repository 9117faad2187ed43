"""Trains the byte-level BPE tokenizer (4096 entries) on an equal share of every domain.

Equal shares matter: a vocabulary fitted to the largest domain would spell the others out letter by
letter and make their tokens, and so their routing, look alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from corpus import CACHE, DOMAINS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 4096
SAMPLE_CHARS = 2_500_000


def sample(path: Path) -> Iterator[str]:
    """Training documents, each domain up to the same number of characters."""
    left = dict.fromkeys(DOMAINS, SAMPLE_CHARS)
    with path.open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            if left[document["domain"]] > 0:
                left[document["domain"]] -= len(document["text"])
                yield document["text"]


def train(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE: no unknown token, any text can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what AutoTokenizer needs: tokenizer.json and tokenizer_config.json."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    save(train(sample(arguments.cache / "text" / "train.jsonl")), arguments.out)


if __name__ == "__main__":
    main()
