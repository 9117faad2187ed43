"""A model larger than the memory its process may take runs from disk, with the same text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expertflow.runtime.machine import Machine, generate_all
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model

from tests.families import folder
from tests.models import FAMILIES, tiny
from tests.runtime.bench import CPU

ROOT = Path(__file__).parents[2]
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 8}
"""Random weights: 128 experts of 1.5 MiB, 192 MiB in float32."""
ALLOWANCE = 96 * 2**20
"""Bytes of its own that a process may take on top of what it has before it loads: half of the experts.

Beside them the checkpoint's file may be mapped: Linux counts such a mapping as the process's own, though none of it is.
"""
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""Or glibc keeps the room of freed tensors, in pieces that depend on what came before."""
PROMPTS = [Prompt(0, tuple(range(40, 60))), Prompt(1, tuple(range(90, 97)))]
NEW_TOKENS = 6

_LIMITED = """
import json, os, resource, sys
import torch
from expertflow.runtime.machine import Machine, generate_all
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.errors import ResourceError
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model

model, warm_up, allowance, mapped, prompts, new_tokens = json.loads(sys.argv[1])
torch.set_num_threads(1)
cpu = torch.device("cpu")
prompts = [Prompt(n, tuple(ids)) for n, ids in enumerate(prompts)]

def run(loaded, slots):
    machine = Machine(loaded, cpu, tier="disk")
    with machine.session(make_spec(slots=slots, predictor="gate_lookahead")) as session:
        outputs = generate_all(
            machine.loaded, prompts, batch_size=2, max_new_tokens=new_tokens, observer=session
        )
    shape = machine.loaded.shape
    machine.close()
    return [one.token_ids for one in outputs], shape.total_experts * shape.expert_bytes

def own_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

run(load_model(warm_up, device=cpu, tier="disk"), 4)  # whatever the libraries take for themselves
limit = own_bytes() + mapped + allowance
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if os.fork() == 0:
    try:
        load_model(model, device=cpu)
    except ResourceError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
    os._exit(0)
os.wait()
texts, expert_bytes = run(load_model(model, device=cpu, tier="disk"), 16)
print(json.dumps({"texts": texts, "expert_bytes": expert_bytes}))
"""


@pytest.fixture(scope="module")
def large():
    return tiny("olmoe", **LARGE)


def limited(model: Path) -> dict:
    mapped = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    prompts = [prompt.token_ids for prompt in PROMPTS]
    told = [str(model), str(tiny()), ALLOWANCE, mapped, prompts, NEW_TOKENS]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **_GIVES_BACK, "PYTHONPATH": str(ROOT / ".typing")},
    )
    assert done.returncode == 0, done.stderr
    return {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's own memory as Linux does")
def test_model_larger_than_its_memory_runs_from_disk_with_the_residents_text(large):
    loaded = load_model(str(large), device=CPU)
    resident = generate_all(loaded, PROMPTS, batch_size=2, max_new_tokens=NEW_TOKENS)

    found = limited(large)

    assert found["expert_bytes"] == 2 * ALLOWANCE
    assert found["texts"] == [one.token_ids for one in resident]
    assert "does not fit in host memory" in found["refused"], "the limit must bite"
    assert "--tier disk" in found["refused"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_loaded_straight_to_disk_are_the_models(family, dtype):
    model = str(tiny(family))
    usual = load_model(model, device=CPU, dtype=dtype)
    straight = load_model(model, device=CPU, dtype=dtype, tier="disk")

    assert straight.blocks is not None
    assert straight.shape == usual.shape
    assert type(straight.model) is type(usual.model)
    for one, other in zip(usual.layers, straight.layers, strict=True):
        assert type(one.module) is type(other.module)
        for name in one.weight_names:
            assert torch.equal(getattr(one.module, name), getattr(other.module, name))
    ids = torch.arange(40, 50)[None]
    with torch.inference_mode():
        assert torch.equal(usual.model(ids).logits, straight.model(ids).logits)
    straight.blocks.close()


def test_experts_loaded_straight_to_disk_are_not_packed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load_model(str(tiny()), device=CPU, tier="disk")
    machine = Machine(loaded, CPU, tier="disk")

    assert machine.blocks is loaded.blocks
    assert len(list(tmp_path.iterdir())) == 1
    assert all(getattr(la.module, n).numel() == 0 for la in loaded.layers for n in la.weight_names)
    machine.close()
    assert list(tmp_path.iterdir()) == []


def test_families_that_keep_experts_in_their_own_way_are_loaded_as_ever():
    model = str(folder("switch_transformers"))
    loaded = load_model(model, device=CPU, tier="disk")

    assert loaded.blocks is None
    machine = Machine(loaded, CPU, tier="disk")
    assert machine.blocks.tier == "disk"
    machine.close()


def test_disk_without_room_leaves_no_model_half_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))

    with pytest.raises(ResourceError, match="The disk tier needs"):
        load_model(str(tiny()), device=CPU, tier="disk")

    monkeypatch.undo()
    loaded = load_model(str(tiny()), device=CPU, tier="disk")
    machine = Machine(loaded, CPU, tier="disk")
    with machine.session(make_spec(slots=4)) as session:
        outputs = generate_all(
            loaded, PROMPTS[:1], batch_size=1, max_new_tokens=2, observer=session
        )
    machine.close()
    assert len(outputs[0].token_ids) == 2
