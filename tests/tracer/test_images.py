"""Prompts that show images: what is read, what reaches the model, and what is refused in which words."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from expertflow.tracer.batch_inputs import joined_inputs
from expertflow.tracer.check import check_trace
from expertflow.tracer.console import progress
from expertflow.tracer.errors import InputError, ResourceError, UsageError
from expertflow.tracer.generate import Prompt, greedy
from expertflow.tracer.images import image_reader
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.memory import SilentObserver
from expertflow.tracer.prompts import as_chat, read_prompts, teacher_forced, tokenize
from expertflow.tracer.store import Trace
from expertflow.tracer.tracing import TraceRequest, trace_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.models import tiny
from tests.vision import FAMILIES, folder, picture

CPU = torch.device("cpu")
NEW_TOKENS = 4
needs_family = pytest.mark.skipif(not FAMILIES, reason="this transformers has no such processor")


def written(tmp_path, *rows):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def shown(tmp_path):
    """A prompt file beside its pictures: two that differ in size and number of images, and one of words."""
    (tmp_path / "pics").mkdir()
    for name, sizes in {"wide": (56, 28), "tall": (28, 56), "plain": (40, 40)}.items():
        picture(tmp_path / "pics" / f"{name}.png", *sizes, shade=len(name))
    return written(
        tmp_path,
        {"id": "one", "text": "What is it?", "images": ["pics/wide.png"]},
        {"id": "two", "text": "Both?", "images": ["pics/tall.png", "pics/plain.png"]},
        {"id": "words", "text": "No image at all."},
    )


# --- prompt files --------------------------------------------------------------------------------


def test_images_are_files_beside_the_prompts(shown):
    one, two, words = read_prompts(shown)

    assert [image.path.name for image in two.images] == ["tall.png", "plain.png"]
    assert one.images[0].where.endswith("p.jsonl, line 1")
    assert words.images == ()
    assert len({one.sha256, two.sha256, words.sha256}) == 3


def test_another_picture_is_another_prompt(tmp_path):
    rows = [{"text": "?", "images": [name]} for name in ("a.png", "b.png", "c.png")]
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", shade=9)
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")

    a, b, c = read_prompts(written(tmp_path, *rows))

    assert a.sha256 == c.sha256 != b.sha256


def test_places_in_messages_are_filled_in_order(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png", shade=ord(name))
    talk = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "and"},
                {"type": "image", "path": "b.png"},
                {"type": "image"},
            ],
        },
    ]

    [prompt] = read_prompts(written(tmp_path, {"messages": talk, "images": ["a.png", "c.png"]}))

    assert [image.path.name for image in prompt.images] == ["a.png", "b.png", "c.png"]
    kinds = [part["type"] for part in json.loads(prompt.text)[1]["content"]]
    assert kinds == ["image", "text", "image", "image"]


def test_images_without_a_place_come_before_the_users_first_words(tmp_path):
    picture(tmp_path / "a.png")
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]

    [prompt] = read_prompts(written(tmp_path, {"messages": talk, "images": ["a.png"]}))

    assert prompt.messages == (("system", "S"), ("user", (prompt.images[0], "U")))


def test_conversations_of_words_in_parts_are_words(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    [prompt] = read_prompts(written(tmp_path, {"messages": [{"role": "user", "content": parts}]}))

    assert prompt.messages == (("user", "one two"),)


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "images": "a.png"}, "must be a list"),
        ({"text": "a", "images": [3]}, "non-empty path"),
        ({"text": "a", "images": [""]}, "non-empty path"),
        ({"text": "a", "images": ["gone.png"]}, "'gone.png' cannot be read: No such file"),
        ({"text": "a", "images": ["."]}, "Is a directory"),
        ({"text": "a", "images": ["a\0b"]}, "cannot be read"),
        ({"text": "a", "images": ["https://example.org/a.png"]}, "is no path"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "leave 1 places .* names 0"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part of a message"),
        ({"messages": [{"role": "user", "content": ["word"]}]}, "part of a message"),
        ({"messages": [{"role": "user", "content": []}]}, "non-empty"),
        ({"messages": [{"role": "system", "content": "S"}], "images": ["ok.png"]}, "no place"),
    ],
)
def test_bad_images_are_named_with_their_line(tmp_path, row, words):
    picture(tmp_path / "ok.png")

    with pytest.raises(InputError, match=rf"p\.jsonl, line 2: .*{words}"):
        read_prompts(written(tmp_path, {"text": "fine"}, row))


# --- joining inputs ------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    data=st.data(),
)
def test_joined_inputs_hold_every_prompts_own_at_the_tokens_side(lengths, data):
    rows = [data.draw(st.booleans()) for _ in lengths]
    inputs = [
        {
            "kinds": torch.arange(1, length + 1)[None],
            "pixels": torch.full((n + 1, 2, n + 2), float(n)),
        }
        if has_image
        else {}
        for n, (length, has_image) in enumerate(zip(lengths, rows, strict=True))
    ]

    joined = joined_inputs(inputs, lengths)

    if not any(rows):
        assert joined == {}
        return
    assert joined["kinds"].shape == (len(lengths), max(lengths))
    for row, (length, has_image) in enumerate(zip(lengths, rows, strict=True)):
        expected = list(range(1, length + 1)) if has_image else [0] * length
        assert joined["kinds"][row].tolist() == [0] * (max(lengths) - length) + expected
    counts = [n + 1 for n, has_image in enumerate(rows) if has_image]
    assert len(joined["pixels"]) == sum(counts)
    first = 0
    for n, has_image in enumerate(rows):
        if has_image:
            own = joined["pixels"][first : first + n + 1]
            assert torch.equal(own[:, :, : n + 2], inputs[n]["pixels"])
            assert not own[:, :, n + 2 :].any()
            first += n + 1


@pytest.mark.parametrize(
    "inputs",
    [
        [{"x": torch.zeros(1, 2, 3)}, {"x": torch.zeros(1, 2)}],
        [{"x": torch.tensor(1)}, {"x": torch.tensor(2)}],
        [{"x": [1]}, {"x": [2]}],
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(inputs):
    with pytest.raises(UsageError, match=r"makes x of them .* --batch-size 1"):
        joined_inputs(inputs, [5, 5])


# --- what reaches the model ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return load_model(str(folder(request.param)), device=CPU)


def prepared(loaded, path, *, chat=False, most=2048):
    texts = read_prompts(path)
    texts = as_chat(texts) if chat else texts
    reader = image_reader(loaded, texts)
    assert reader is not None
    return texts, tokenize(loaded.tokenizer, texts, most, reader), reader


def ours(loaded, prompts):
    return [
        one.token_ids
        for one in greedy(
            loaded.model,
            prompts,
            max_new_tokens=NEW_TOKENS,
            eos_ids=frozenset(),
            pad_id=loaded.pad_id,
            first_step=0,
            observer=SilentObserver(),
        )
    ]


def theirs(loaded, reader, texts):
    """What the library makes of the same prompts, from the processor to the last token."""
    made = reader._processor(
        text=[reader._written(text) if text.images else text.text for text in texts],
        images=[[Image.open(image.path) for image in text.images] for text in texts],
        text_kwargs={"padding": True, "padding_side": "left"},
        return_tensors="pt",
    )
    output = loaded.model.generate(
        **made,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=loaded.pad_id,
    )
    return output[:, made["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_text_is_that_of_the_library_for_the_same_images(loaded, shown, size):
    texts, prompts, reader = prepared(loaded, shown)
    reader.require_batches(prompts, texts, size)

    assert ours(loaded, prompts[:size]) == theirs(loaded, reader, texts[:size])


def test_the_picture_changes_the_text(loaded, shown):
    _, prompts, _ = prepared(loaded, shown)
    before = ours(loaded, prompts[:1])
    for name in ("wide", "tall", "plain"):
        with Image.open(shown.parent / "pics" / f"{name}.png") as image:
            size = image.size
        picture(shown.parent / "pics" / f"{name}.png", *size, shade=120)

    _, changed, _ = prepared(loaded, shown)

    assert changed[0].token_ids == prompts[0].token_ids
    assert ours(loaded, changed[:1]) != before


def test_chat_template_writes_the_images_out(loaded, shown):
    _, prompts, _ = prepared(loaded, shown, chat=True)

    written_out = loaded.tokenizer.decode(prompts[1].token_ids)

    assert written_out.startswith("[user]")
    assert written_out.endswith("Both?[assistant]")


def test_marks_in_the_text_say_where_images_stand(loaded, tmp_path):
    picture(tmp_path / "a.png")
    _, _, reader = prepared(loaded, written(tmp_path, {"text": "a", "images": ["a.png"]}))
    mark = reader._processor.image_token
    path = written(tmp_path, {"text": f"left {mark} right", "images": ["a.png"]})

    _, [prompt], _ = prepared(loaded, path)

    shown_ids = [reader.modalities.get(token) == "image" for token in prompt.token_ids]
    assert not any(shown_ids[:5])
    assert not any(shown_ids[-6:])
    assert any(shown_ids)
    with pytest.raises(InputError, match="line 1, prompt '1': the model's processor refuses"):
        prepared(loaded, written(tmp_path, {"text": mark * 2, "images": ["a.png"]}))


def test_images_side_by_side_are_told_apart_or_refused(loaded, tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", shade=ord(name))
    rows = {"text": "a", "images": ["a.png", "b.png"]}
    _, [apart], reader = prepared(loaded, written(tmp_path, rows))
    rows["text"] = reader._processor.image_token * 2
    path = written(tmp_path, rows)

    if "mm_token_type_ids" in apart.inputs:
        with pytest.raises(InputError, match="2 images leave 1 runs"):
            prepared(loaded, path)
    else:
        _, beside, _ = prepared(loaded, path)
        assert len(ours(loaded, beside)[0]) == NEW_TOKENS


def test_a_cut_behind_the_images_keeps_them_and_one_inside_is_refused(loaded, tmp_path):
    picture(tmp_path / "a.png")
    path = written(tmp_path, {"text": "x" * 30, "images": ["a.png"]})
    _, [whole], reader = prepared(loaded, path)
    length = len(whole.token_ids)

    _, [cut], _ = prepared(loaded, path, most=length - 20)

    assert cut.token_ids == whole.token_ids[: length - 20]
    assert len(ours(loaded, [cut])[0]) == NEW_TOKENS
    last = max(n for n, token in enumerate(whole.token_ids) if token in reader.modalities)
    with pytest.raises(InputError, match=r"line 1, prompt '1' has .* would fall into an image"):
        prepared(loaded, path, most=last)


def test_completions_follow_images(loaded, tmp_path):
    picture(tmp_path / "a.png")
    rows = {"text": "a", "images": ["a.png"], "completion": "xyz"}
    texts, _, reader = prepared(loaded, written(tmp_path, rows))

    [forced] = teacher_forced(loaded.tokenizer, texts, 2048, 2, reader)

    assert loaded.tokenizer.decode(forced.forced) == "xy"
    assert forced.inputs
    del rows["completion"]
    with pytest.raises(InputError, match=r"line 1\) shows images"):
        teacher_forced(loaded.tokenizer, read_prompts(written(tmp_path, rows)), 2048, 2, reader)


# --- the command ---------------------------------------------------------------------------------


def trace(tmp_path, model, prompts, **more):
    request = TraceRequest(
        out=tmp_path / "t",
        model=str(model),
        prompts=prompts,
        device="cpu",
        max_new_tokens=NEW_TOKENS,
        **more,
    )
    trace_run(request, progress=progress, say=lambda words: None)
    check_trace(tmp_path / "t")
    return Trace.open(tmp_path / "t")


@needs_family
@pytest.mark.parametrize(("size", "residency"), [(1, "resident"), (3, "stream")])
def test_a_run_marks_the_tokens_of_images(tmp_path, shown, size, residency):
    found = trace(tmp_path, folder(FAMILIES[0]), shown, batch_size=size, residency=residency)

    rows = found.table("routing", ["sequence", "phase", "modality", "layer", "step"]).to_pandas()
    first = rows[rows.layer == 0]
    prefill = first[first.phase == "prefill"]
    counts = prefill[prefill.modality == "image"].groupby("sequence").size()
    assert set(counts.index) == {0, 1}
    assert counts[1] > counts[0]
    assert set(first[first.phase == "decode"].modality) <= {"text", "pad"}
    lengths = found.table("sequences")["prompt_tokens"].to_pylist()
    assert (prefill[prefill.modality != "pad"].groupby("sequence").size() == lengths).all()


@needs_family
def test_a_resumed_run_with_another_picture_is_refused(tmp_path, shown):
    trace(tmp_path, folder(FAMILIES[0]), shown)
    picture(shown.parent / "pics" / "wide.png", 56, 28, shade=77)

    with pytest.raises(UsageError, match="prompts"):
        trace(tmp_path, folder(FAMILIES[0]), shown, resume=True)


def run(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code, capsys.readouterr().err


def test_a_model_that_reads_text_only_refuses_images(tmp_path, capsys, shown):
    code, err = run(capsys, "run", "--out", tmp_path / "t", "--model", tiny(), "--prompts", shown)

    assert code == 3
    assert "p.jsonl, line 1" in err
    assert "reads text only" in err
    assert "Traceback" not in err


@needs_family
def test_a_model_without_processor_says_what_it_lacks(tmp_path, shown):
    bare = tmp_path / "bare"
    shutil.copytree(folder(FAMILIES[0]), bare)
    for path in bare.glob("*process*"):
        path.unlink()

    with pytest.raises(ResourceError, match=r"processor"):
        prepared(load_model(str(bare), device=CPU), shown)


@needs_family
def test_damaged_pictures_are_named_with_their_line(tmp_path, shown):
    (shown.parent / "pics" / "wide.png").write_bytes(b"\x89PNG but not really")

    with pytest.raises(InputError, match=r"line 1: .*wide\.png is no image"):
        prepared(load_model(str(folder(FAMILIES[0])), device=CPU), shown)


@needs_family
def test_without_pillow_the_extra_is_named(shown, monkeypatch):
    loaded = load_model(str(folder(FAMILIES[0])), device=CPU)
    texts = read_prompts(shown)
    monkeypatch.setitem(sys.modules, "PIL", None)

    with pytest.raises(ResourceError, match=r"expertflow-trace\[vision\]"):
        image_reader(loaded, texts)
    importlib.invalidate_caches()


@needs_family
def test_images_that_the_processor_joins_otherwise_are_refused(shown, monkeypatch):
    texts, prompts, reader = prepared(load_model(str(folder(FAMILIES[0])), device=CPU), shown)
    made = reader._made

    def shuffled(several):
        return {**made(several), "pixel_values": made(several)["pixel_values"].flip(0)}

    monkeypatch.setattr(reader, "_made", shuffled)

    with pytest.raises(UsageError, match=r"pixel_values .* --batch-size 1"):
        reader.require_batches(prompts, texts, 2)


def test_models_with_a_loop_of_their_own_refuse_inputs():
    from tests.families import folder as family_folder

    loaded = load_model(str(family_folder("switch_transformers")), device=CPU)

    with pytest.raises(UsageError, match="text only"):
        ours(loaded, [Prompt(0, (40, 41), (), {"pixel_values": torch.zeros(1)})])
