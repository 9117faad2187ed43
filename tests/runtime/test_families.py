"""Every family that is traced also runs offloaded: the resident model's text, from half of the slots and from few."""

import pytest
import torch
from expertflow.runtime.machine import generate_all
from expertflow.runtime.session import Session
from expertflow.simulator.policy.replay import replay
from expertflow.simulator.policy.spec import make_spec
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model

from tests.families import SERVED, folder

CPU = torch.device("cpu")
PROMPTS = [Prompt(0, (40, 41, 42, 43, 44)), Prompt(1, (70, 75, 80))]
NEW_TOKENS = 3


@pytest.mark.parametrize("family", SERVED)
def test_family_gives_the_residents_text_offloaded(family):
    loaded = load_model(str(folder(family)), device=CPU)
    shape = loaded.shape
    batch = (
        1 if hasattr(loaded.model.config, "canvas_length") else 2
    )  # block diffusion: one prompt at a time
    resident = generate_all(loaded, PROMPTS, batch_size=batch, max_new_tokens=NEW_TOKENS)
    blocks = HostBlocks(loaded.layers)
    for spec in (
        make_spec(slots=shape.total_experts // 2),
        # As many as one token wants of one layer: every larger event runs in waves.
        make_spec(slots=shape.top_k, allocation="global"),
    ):
        session = Session(loaded, blocks, spec, CPU)
        outputs = generate_all(
            loaded, PROMPTS, batch_size=batch, max_new_tokens=NEW_TOKENS, observer=session
        )
        session.close()

        assert [one.token_ids for one in outputs] == [one.token_ids for one in resident]
        assert replay(session.log, spec, shape).is_exact
        assert session.outcomes["misses"] > 0
    blocks.close()
