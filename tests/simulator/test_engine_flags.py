"""A policy in other engines' flags: never more experts on the GPU than it has slots, and what is lost is said."""

import json
import re
from dataclasses import replace

import pytest
from expertflow.simulator.engine_flags import ENGINES, engine_flags
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.policy.spec import PolicyFile, make_spec, write_policy
from expertflow.tracer.errors import UsageError
from expertflow.tracer.main import main
from expertflow.tracer.types import ModelShape
from hypothesis import given
from hypothesis import strategies as st

GIB = 2**30
SHAPE = replace(
    tiny_shape(num_layers=4, num_experts=8, top_k=2),
    num_layers=5,
    moe_layers=(1, 2, 3, 4),  # the first layer is dense
    expert_bytes=GIB // 8,
)


def policy(slots: int, shape: ModelShape = SHAPE, **members) -> PolicyFile:
    spec = make_spec(slots=slots, **members)
    return PolicyFile(
        behaviour=spec,
        behaviour_hash=spec.behaviour_hash(),
        shape=shape,
        budget=f"{slots}slots",
        trace="none",
    )


def value(flags: tuple[str, ...], name: str) -> str:
    return flags[flags.index(name) + 1]


def on_cpu(flags: tuple[str, ...], shape: ModelShape = SHAPE) -> set[int]:
    """The layers whose experts llama.cpp would keep on the CPU: of the layers that have experts."""
    if "--override-tensor" in flags:
        pattern, _, place = value(flags, "--override-tensor").rpartition("=")
        assert place == "CPU"
        names = {
            layer: f"blk.{layer}.ffn_{part}_exps.weight"
            for layer in shape.moe_layers
            for part in ("up", "down", "gate")
        }
        return {layer for layer, name in names.items() if re.search(pattern, name)}
    if "--n-cpu-moe" in flags:
        return {layer for layer in shape.moe_layers if layer < int(value(flags, "--n-cpu-moe"))}
    return set()


@given(st.integers(1, 40), st.sampled_from(["equal", "global"]))
def test_llama_cpp_keeps_as_many_whole_layers_as_there_are_slots_for(slots, allocation):
    found = engine_flags(policy(slots, allocation=allocation), "llama.cpp")

    whole = min(slots, 32) // 8
    cpu = on_cpu(found.flags)
    assert len(cpu) == 4 - whole
    assert found.gpu_experts == whole * 8 <= slots
    assert value(found.flags, "--n-gpu-layers") == "999"
    if found.alternative:
        assert on_cpu(found.alternative) == cpu
    # Even slots need no pattern: the first layers go, dense ones counted.
    assert "--n-cpu-moe" in found.flags
    assert int(value(found.flags, "--n-cpu-moe")) == (5 - whole if whole < 4 else 0)


def test_llama_cpp_matches_its_own_tensors_only():
    found = engine_flags(policy(8), "llama.cpp")
    pattern = value(found.alternative, "--override-tensor").rpartition("=")[0]

    assert re.search(pattern, "blk.1.ffn_gate_up_exps.weight")
    assert re.search(pattern, "blk.3.ffn_up_chexps.weight")
    assert not re.search(pattern, "blk.1.ffn_gate_inp.weight")
    assert not re.search(pattern, "blk.1.ffn_up_shexp.weight")
    assert not re.search(pattern, "blk.11.ffn_up_exps.weight")
    assert not re.search(pattern, "blk.4.ffn_up_exps.weight")
    assert "," not in pattern  # it would end the override


def test_llama_cpp_names_layers_where_the_policy_prefers_some():
    # Hits rise in the second layer alone, so it gets every slot there is to give.
    curves = [[0, 1, 1, 1, 1, 1, 1, 1, 1] for _ in range(4)]
    curves[1] = [0, 10, 20, 30, 40, 50, 60, 70, 80]

    found = engine_flags(policy(11, allocation="marginal_gain", curves=curves), "llama.cpp")

    assert "--override-tensor" in found.flags
    assert on_cpu(found.flags) == {1, 3, 4}
    assert found.alternative == ()


@given(st.integers(1, 40))
def test_ktransformers_gets_experts_per_layer(slots):
    found = engine_flags(policy(slots), "ktransformers")

    each = int(value(found.flags, "--kt-num-gpu-experts"))
    assert each == min(8, slots // 4)
    assert found.gpu_experts == 4 * each <= max(slots, 0)
    assert value(found.flags, "--kt-expert-placement-strategy") == "uniform"
    ratio = float(value(found.alternative, "--kt-gpu-experts-ratio"))
    assert 4 * each - 1 < ratio * 32 <= 4 * each


@given(st.integers(1, 40))
def test_vllm_moves_what_the_slots_do_not_hold(slots):
    found = engine_flags(policy(slots), "vllm")

    if slots >= 32:
        assert found.flags == ()
        return
    gib = float(value(found.flags, "--cpu-offload-gb"))
    needed = (32 - slots) / 8
    assert needed <= gib < needed + 0.01
    assert found.flags[-2:] == ("--cpu-offload-params", "experts")


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_what_is_lost_is_said(engine):
    popularity = [[8, 7, 6, 5, 4, 3, 2, 1]] * 4
    dynamic = engine_flags(policy(12, cache="lru", predictor="gate_lookahead"), engine)
    static = engine_flags(policy(12, cache="static", popularity=popularity), engine)

    assert any(words.startswith("Cache lru: lost") for words in dynamic.lost)
    assert any(words.startswith("Predictor gate_lookahead: lost") for words in dynamic.lost)
    assert not any("Predictor" in words for words in static.lost)
    assert any("static" in words or "popular" in words for words in static.lost)
    for words in (*dynamic.lost, *static.lost):
        assert words.endswith(".")


def test_encoders_and_unknown_engines_are_refused():
    both = replace(SHAPE, moe_layers=(1, 2, 1, 2))

    with pytest.raises(UsageError, match="encoder"):
        engine_flags(policy(8, shape=both), "vllm")
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        engine_flags(policy(8), "llama")


def test_the_command_prints_what_can_be_pasted(tmp_path, capsys):
    path = tmp_path / "policy.json"
    write_policy(path, policy(12, cache="lru"))

    def ran(*args) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["export-flags", str(path), *args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    code, text, _ = ran("--engine", "llama.cpp")
    assert code == 0
    assert "llama-server … --n-gpu-layers 999 --n-cpu-moe 4" in text
    assert "Cache lru: lost" in text
    code, text, _ = ran("--engine", "vllm", "--json", "--out", str(tmp_path / "flags.json"))
    assert code == 0
    document = json.loads(text)
    assert document == json.loads((tmp_path / "flags.json").read_text())
    assert document["format"] == "expertflow.flags/1"
    assert document["slots"] == 12
    code, _, err = ran("--engine", "ollama")
    assert code == 2
    assert "ollama" in err
