"""Prompt files: what is read, what is refused, and how prompts are chosen and batched."""

import hashlib
import json

import pytest
from expertflow.tracer.check import check_trace
from expertflow.tracer.console import progress
from expertflow.tracer.errors import InputError, ResourceError, UsageError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.prompts import (
    PromptText,
    as_chat,
    batches,
    choose_prompts,
    is_teacher_forced,
    labelled,
    read_prompts,
    teacher_forced,
    tokenize,
)
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run
from transformers import AutoTokenizer

from tests.models import tiny


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
    [
        '{"text": "a"',
        "[1, 2]",
        '{"text": 3}',
        '{"text": ""}',
        '{"words": "a"}',
        '"text"',
        "null",
        '{"text": "a", "completion": ""}',
        '{"text": "a", "completion": 4}',
        '{"messages": []}',
        '{"messages": "hello"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": ""}]}',
        '{"messages": [{"role": "wizard", "content": "hello"}]}',
    ],
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

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_tokens_are_numbered_by_prompt_and_cut():
    prompts = tokenize(Words(), [PromptText("a", "", "i am"), PromptText("b", "", "a b c d")], 3)

    assert prompts == [Prompt(0, (1, 2)), Prompt(1, (1, 1, 1))]


def test_prompt_without_tokens_is_named():
    with pytest.raises(InputError, match="'blank' has no tokens"):
        tokenize(Words(), [PromptText("blank", "", "  ")], 3)


# --- conversations -------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ANSWER = {"role": "assistant", "content": "Good day."}


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(tiny())
    found.chat_template = TEMPLATE
    return found


def fed(tokenizer, prompt: Prompt) -> str:
    return tokenizer.decode(prompt.token_ids)


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    rows = [{"messages": TALK}, {"text": "plain"}]
    talk, plain = read_prompts(written(tmp_path, "\n".join(map(json.dumps, rows))))

    prompts = tokenize(tokenizer, [talk, *as_chat([plain]), plain], 100)

    assert [fed(tokenizer, prompt) for prompt in prompts] == [
        "[system]Be brief.[user]Hello[assistant]",
        "[user]plain[assistant]",
        "plain",
    ]
    assert talk.sha256 == hashlib.sha256(json.dumps(TALK).encode()).hexdigest()


def test_answer_at_the_end_of_a_conversation_is_its_completion(tmp_path, tokenizer):
    [prompt] = read_prompts(written(tmp_path, json.dumps({"messages": [*TALK, ANSWER]})))

    [forced] = teacher_forced(tokenizer, [prompt], 100, 50)

    assert fed(tokenizer, forced).endswith("Hello[assistant]")
    assert tokenizer.decode(forced.forced) == "Good day."


def test_template_labels_are_kept_and_made(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK, "template": "mine"}, {"text": "a"}]
    prompts = labelled(read_prompts(written(tmp_path, "\n".join(map(json.dumps, rows)))))

    assert [prompt.template for prompt in prompts] == ["chat", "mine", ""]


def test_conversation_without_a_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None

    with pytest.raises(ResourceError, match="no chat template"):
        tokenize(tokenizer, as_chat([PromptText("1", "", "a")]), 9)


def test_template_that_refuses_a_conversation_names_the_prompt(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    with pytest.raises(InputError, match=r"'a7'.*roles must alternate"):
        tokenize(tokenizer, as_chat([PromptText("a7", "", "a")]), 9)


# --- teacher forcing -----------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "found"), [(None, True), (True, True), (False, False)])
def test_completions_are_fed_unless_told_otherwise(wanted, found):
    assert is_teacher_forced([PromptText("1", "", "a", completion="b")], wanted) is found


def test_text_is_the_models_own_unless_asked_for():
    assert not is_teacher_forced([PromptText("1", "", "a")], None)
    assert is_teacher_forced([PromptText("1", "", "a")], True)


def test_file_in_which_only_some_bring_a_completion_needs_a_choice():
    mixed = [PromptText("1", "", "a", completion="b"), PromptText("2", "", "a")]

    with pytest.raises(InputError, match=r"1 of 2 prompts .* prompt '2' does not"):
        is_teacher_forced(mixed, None)
    assert is_teacher_forced(mixed, True)
    assert not is_teacher_forced(mixed, False)


def test_text_without_a_completion_gives_its_last_tokens():
    whole = PromptText("1", "", "a bb ccc dddd")

    assert teacher_forced(Words(), [whole], 9, 2) == [Prompt(0, (1, 2), (3, 4))]
    assert teacher_forced(Words(), [whole], 9, 99) == [Prompt(0, (1,), (2, 3, 4))]
    assert teacher_forced(Words(), [whole], 3, 1) == [Prompt(0, (1, 2), (3,))]


def test_completion_is_cut_at_the_tokens_asked_for():
    given = PromptText("1", "", "a bb", completion="ccc dddd eeeee")

    assert teacher_forced(Words(), [given], 9, 2) == [Prompt(0, (1, 2), (3, 4))]
    with pytest.raises(InputError, match="'blank' leaves no token"):
        teacher_forced(Words(), [PromptText("blank", "", "one", completion="  ")], 9, 2)
    with pytest.raises(InputError, match="'short' leaves no token"):
        teacher_forced(Words(), [PromptText("short", "", "one")], 9, 2)


def test_forced_run_records_the_given_text_and_says_so(tmp_path):
    given = ["abcde", "xyz"]
    rows = [{"text": "Say it:", "completion": text, "template": "say"} for text in given]
    prompts = written(tmp_path, "\n".join(map(json.dumps, rows)))
    request = TraceRequest(
        out=tmp_path / "t", model=str(tiny()), prompts=prompts, batch_size=2, device="cpu"
    )

    trace_run(request, progress=progress, say=lambda words: None)

    trace = Trace.open(tmp_path / "t")
    check_trace(trace.path)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    sequences = trace.table("sequences").to_pylist()
    assert [tokenizer.decode(row["output_ids"]) for row in sequences] == given
    assert [row["template"] for row in sequences] == ["say", "say"]
    assert trace.manifest.provenance.text == "teacher-forced"
    decoded = trace.table(
        "routing",
        ["token_id", "position"],
        [("phase", "=", "decode"), ("layer", "=", 0), ("sequence", "=", 1)],
    ).to_pylist()
    # The last given token is the answer to the one before it and is never fed; then comes padding.
    fed_ids = [row["token_id"] for row in decoded if row["position"] >= 0]
    assert tokenizer.decode(fed_ids) == "xy"
    assert [row["position"] for row in decoded] == [7, 8, -1, -1]
