"""Routing replay on a CUDA device: weights drawn there, experts in pinned blocks, recorded choices in every layer."""

import pytest
import torch
from expertflow.runtime.replay.build import unfilled_model
from expertflow.runtime.replay.machine import ReplayMachine
from expertflow.runtime.replay.routing import token_routing
from expertflow.runtime.replay.run import Replay, planned
from expertflow.runtime.replay.shapes import shape_config
from expertflow.simulator.engine import simulate
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.store import Trace

from tests.models import FAMILIES, tiny
from tests.runtime.bench import COSTS
from tests.runtime.test_replay import DEMO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_demands_what_was_recorded(family, dtype):
    device = torch.device("cuda", 0)
    loaded = unfilled_model(shape_config(str(tiny(family))), name=family, dtype=dtype)
    routing = token_routing(Trace.open(DEMO))
    plan = planned(loaded, routing, limit=6, new_tokens=4, prompt_tokens=8)
    machine = ReplayMachine(loaded, plan, device)
    try:
        replay = Replay(machine, batch_size=2)
        spec = make_spec(slots=max(2, loaded.shape.total_experts // 2))
        _, _, whole = replay.run(make_spec(slots=loaded.shape.total_experts))
        result, record, outputs = replay.run(spec)
        simulated = simulate(replay.workload, spec, loaded.shape, COSTS)
        assert machine.blocks.pinned
    finally:
        machine.close()

    assert list(record.log) == list(simulated.log)
    assert result.log_replays
    assert [one.token_ids for one in outputs] == [one.token_ids for one in whole]
