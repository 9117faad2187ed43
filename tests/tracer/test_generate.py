"""Greedy generation: the library's own tokens, with every pass and every token accounted for."""

import pytest
import torch
from expertflow.tracer.generate import Prompt, StepTokens, greedy
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import SilentObserver

from tests.models import FAMILIES, tiny

CPU = torch.device("cpu")
PROMPTS = [
    Prompt(4, (40, 41, 42, 43, 44)),
    Prompt(5, (70, 75)),
    Prompt(7, tuple(range(100, 112))),
]


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(tiny()), device=CPU)


class Keeper(SilentObserver):
    """Keeps what it was told; each pass takes one second."""

    def __init__(self):
        self.steps = []

    def begin_step(self, info, tokens: StepTokens) -> None:
        self.steps.append((info, tokens))

    def end_step(self) -> float:
        return 1.0


def ours(loaded, prompts, new_tokens=8, eos=frozenset(), observer=None, first_step=0):
    return greedy(
        loaded.model,
        prompts,
        max_new_tokens=new_tokens,
        eos_ids=frozenset(eos),
        pad_id=loaded.pad_id,
        first_step=first_step,
        observer=observer or SilentObserver(),
    )


def theirs(loaded, prompts, new_tokens=8, eos=()):
    """model.generate on the same left-padded batch, cut behind the first end mark."""
    width = max(len(p.token_ids) for p in prompts)
    ids = [[loaded.pad_id] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts]
    mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
    output = loaded.model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(eos) or None,
        pad_token_id=loaded.pad_id,
    )
    texts = []
    for row in output[:, width:].tolist():
        ends = [place for place, token in enumerate(row) if token in eos]
        texts.append(row[: ends[0] + 1] if ends else row)
    return texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 3])
def test_tokens_are_those_of_generate(family, size):
    loaded = load_model(str(tiny(family)), device=CPU)
    loaded.model.generation_config.eos_token_id = None

    outputs = ours(loaded, PROMPTS[:size])

    assert [one.token_ids for one in outputs] == theirs(loaded, PROMPTS[:size])
    assert [one.sequence for one in outputs] == [p.sequence for p in PROMPTS[:size]]
    assert all(one.finish == "length" for one in outputs)


def test_text_depends_on_the_prompt(loaded):
    outputs = ours(loaded, PROMPTS)

    assert len({tuple(one.token_ids) for one in outputs}) == 3


def test_ended_sequences_stop_as_in_generate(loaded):
    free = ours(loaded, PROMPTS)
    eos = {free[0].token_ids[2], free[2].token_ids[5]}

    outputs = ours(loaded, PROMPTS, eos=eos)

    assert [one.token_ids for one in outputs] == theirs(loaded, PROMPTS, eos=eos)
    assert outputs[0].finish == "eos"
    assert outputs[0].token_ids[-1] in eos
    assert len(outputs[0].token_ids) <= 3


def test_generation_stops_when_all_sequences_have_ended(loaded):
    [free] = ours(loaded, PROMPTS[:1])
    keeper = Keeper()

    [output] = ours(loaded, PROMPTS[:1], eos={free.token_ids[2]}, observer=keeper)

    stop = free.token_ids.index(free.token_ids[2]) + 1
    assert output.token_ids == free.token_ids[:stop]
    assert len(keeper.steps) == stop


def test_passes_are_numbered_and_sized(loaded):
    keeper = Keeper()

    ours(loaded, PROMPTS, 4, observer=keeper, first_step=10)

    infos = [info for info, _ in keeper.steps]
    assert [info.step for info in infos] == [10, 11, 12, 13]
    assert [info.phase for info in infos] == ["prefill", "decode", "decode", "decode"]
    assert [info.tokens for info in infos] == [36, 3, 3, 3]
    assert [info.context for info in infos] == [12, 13, 14, 15]
    assert all(info.batch == 3 for info in infos)


def test_positions_count_real_tokens_and_mark_padding(loaded):
    keeper = Keeper()

    outputs = ours(loaded, PROMPTS, 3, observer=keeper)

    _, prefill = keeper.steps[0]
    rows = list(zip(prefill.sequence, prefill.position, prefill.token_id, strict=True))
    for place, prompt in enumerate(PROMPTS):
        own = rows[12 * place : 12 * place + 12]
        padding = 12 - len(prompt.token_ids)
        assert own[:padding] == [(prompt.sequence, -1, loaded.pad_id)] * padding
        assert own[padding:] == [
            (prompt.sequence, position, token) for position, token in enumerate(prompt.token_ids)
        ]
    for count, (_, tokens) in enumerate(keeper.steps[1:], start=1):
        assert tokens.sequence == [4, 5, 7]
        assert tokens.position == [len(p.token_ids) + count - 1 for p in PROMPTS]
        assert tokens.token_id == [one.token_ids[count - 1] for one in outputs]


def test_rows_of_an_ended_sequence_are_padding(loaded):
    free = ours(loaded, PROMPTS)
    keeper = Keeper()

    outputs = ours(loaded, PROMPTS, eos={free[0].token_ids[0]}, observer=keeper)

    assert outputs[0].token_ids == free[0].token_ids[:1]
    for _, tokens in keeper.steps[1:]:
        assert tokens.position[0] == -1
        assert tokens.token_id[0] == loaded.pad_id


def test_one_token_prompts_start_at_position_zero(loaded):
    keeper = Keeper()

    ours(loaded, [Prompt(0, (9,))], 2, observer=keeper)

    assert [tokens.position for _, tokens in keeper.steps] == [[0], [1]]
    assert [info.phase for info, _ in keeper.steps] == ["prefill", "decode"]


def test_token_times_add_up_the_passes(loaded):
    outputs = ours(loaded, PROMPTS, 4, observer=Keeper())

    assert all(one.token_s == [1.0, 2.0, 3.0, 4.0] for one in outputs)
