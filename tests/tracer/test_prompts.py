"""Prompt files: what is read, what is refused, and how prompts are chosen and batched."""

import hashlib
import json

import pytest
from expertflow.tracer.errors import InputError, UsageError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.prompts import (
    PromptText,
    batches,
    choose_prompts,
    read_prompts,
    tokenize,
)


def written(tmp_path, body: str, name: str = "p.jsonl"):
    path = tmp_path / name
    path.write_bytes(body.encode("utf-8"))
    return path


def test_text_file_gives_one_prompt_per_line_that_is_not_blank(tmp_path):
    prompts = read_prompts(written(tmp_path, "one\n\n  \ntwo words\r\nthree", "p.txt"))

    assert [(p.prompt_id, p.text) for p in prompts] == [
        ("1", "one"),
        ("4", "two words"),
        ("5", "three"),
    ]


def test_json_lines_give_text_id_and_domain(tmp_path):
    rows = [
        {"id": "a", "domain": "code", "text": "x = 1"},
        {"prompt": "by its other name"},
        {"id": 7, "text": "numbered"},
    ]

    prompts = read_prompts(written(tmp_path, "\n".join(map(json.dumps, rows))))

    assert prompts == [
        PromptText("a", "code", "x = 1"),
        PromptText("2", "", "by its other name"),
        PromptText("7", "", "numbered"),
    ]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_characters_that_python_takes_for_line_ends_stay_inside_a_prompt(tmp_path, odd):
    as_json = json.dumps({"text": f"a{odd}b"}, ensure_ascii=False)

    [from_json] = read_prompts(written(tmp_path, as_json + "\n"))
    [from_text] = read_prompts(written(tmp_path, f"a{odd}b\n", "p.txt"))

    assert from_json.text == from_text.text == f"a{odd}b"


def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    [prompt] = read_prompts(written(tmp_path, '\ufeff{"text": "a"}\n'))

    assert prompt.text == "a"


@pytest.mark.parametrize(
    "bad",
    ['{"text": "a"', "[1, 2]", '{"text": 3}', '{"text": ""}', '{"words": "a"}', '"text"', "null"],
)
def test_bad_line_is_named_with_its_file(tmp_path, bad):
    path = written(tmp_path, '{"text": "fine"}\n' + bad + "\n")

    with pytest.raises(InputError, match=r"p\.jsonl, line 2: "):
        read_prompts(path)


def test_empty_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00bad")

    with pytest.raises(InputError, match="is empty"):
        read_prompts(written(tmp_path, "\n \n"))
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "binary.txt")


def test_shipped_prompts_are_read_by_default():
    assert len(read_prompts(None)) > 2


def test_hash_is_that_of_the_text():
    assert PromptText("1", "", "ä").sha256 == hashlib.sha256("ä".encode()).hexdigest()


@pytest.mark.parametrize(("limit", "kept"), [(None, 10), (10, 10), (99, 10), (1, 1), (3, 3)])
def test_limit_keeps_that_many(limit, kept):
    prompts = [PromptText(str(n), "", "x") for n in range(10)]

    chosen = choose_prompts(prompts, limit)

    assert len(chosen) == kept
    assert len({p.prompt_id for p in chosen}) == kept


def test_limited_prompts_are_spread_over_the_file():
    prompts = [PromptText(str(n), f"d{n // 4}", "x") for n in range(12)]

    assert [p.domain for p in choose_prompts(prompts, 3)] == ["d0", "d1", "d2"]


def test_limit_and_batch_size_below_one_are_refused():
    with pytest.raises(UsageError, match="--limit must be at least 1, got 0"):
        choose_prompts([PromptText("1", "", "x")] * 3, 0)
    with pytest.raises(UsageError, match="--batch-size must be at least 1, got 0"):
        list(batches([Prompt(0, (1,))], 0))


def test_batches_are_consecutive_and_the_last_may_be_smaller():
    prompts = [Prompt(n, (1,)) for n in range(5)]

    assert [[p.sequence for p in batch] for batch in batches(prompts, 2)] == [[0, 1], [2, 3], [4]]


class Words:
    """A tokenizer with a token per word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_tokens_are_numbered_by_prompt_and_cut():
    prompts = tokenize(Words(), [PromptText("a", "", "i am"), PromptText("b", "", "a b c d")], 3)

    assert prompts == [Prompt(0, (1, 2)), Prompt(1, (1, 1, 1))]


def test_prompt_without_tokens_is_named():
    with pytest.raises(InputError, match="'blank' has no tokens"):
        tokenize(Words(), [PromptText("blank", "", "  ")], 3)
