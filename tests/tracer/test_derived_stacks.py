"""Parts and unions of encoder-decoder traces: a step runs one stack of layers, and its sizes are that stack's."""

import numpy as np
import pytest
from expertflow.simulator.workload import workload_of
from expertflow.tracer.check import check_trace
from expertflow.tracer.console import progress
from expertflow.tracer.division import sample_sequences, split_sequences
from expertflow.tracer.merge import merge_traces
from expertflow.tracer.schema import WHOLE_STEP
from expertflow.tracer.store import Trace
from expertflow.tracer.subset import write_subset
from expertflow.tracer.tracing import TraceRequest, trace_run

from tests.families import folder
from tests.models import TEXTS, write_prompts


@pytest.fixture(scope="module", params=["switch_transformers", "nllb_moe"])
def source(request, tmp_path_factory):
    """Five prompts in batches of two, of different lengths."""
    place = tmp_path_factory.mktemp("stacks")
    asked = TraceRequest(
        out=place / "t",
        model=str(folder(request.param)),
        prompts=write_prompts(place / "p.jsonl", TEXTS[:5]),
        batch_size=2,
        max_new_tokens=4,
        device="cpu",
        lookahead=0,
    )
    trace_run(asked, progress=progress, say=lambda words: None)
    return Trace.open(place / "t")


def require_sizes(trace: Trace) -> None:
    """Every row of the steps table has the sizes of its own routing."""
    check_trace(trace.path)
    routing = trace.routing_arrays()
    for row in trace.table("steps").to_pandas().itertuples():
        mine = routing.step == row.step
        layers = np.unique(routing.layer[mine]).tolist()
        stack = trace.shape.stacks[row.phase == "decode"]
        assert layers == list(stack)
        here = mine & (routing.layer == (layers[0] if row.layer == WHOLE_STEP else row.layer))
        assert row.tokens == here.sum() > 0
        assert row.batch == len(np.unique(routing.sequence[here]))
        distinct = len(np.unique(routing.experts[here]))
        assert row.distinct == (0 if row.layer == WHOLE_STEP else distinct)


def test_the_recording_itself_has_the_sizes_of_its_stacks(source):
    require_sizes(source)


@pytest.mark.parametrize("chosen", [[0], [1], [1, 2], [4], [2, 3], [0, 2, 4]])
def test_a_part_has_the_sizes_of_its_own_stacks(source, tmp_path, chosen):
    write_subset(source, chosen, tmp_path / "part", seed=0, note="")

    part = Trace.open(tmp_path / "part")
    require_sizes(part)
    is_torn = chosen not in ([4], [2, 3])
    assert part.has_times is not is_torn
    assert workload_of(part).steps.tokens.min() > 0


def test_split_and_sample_divide_by_sequences_of_both_stacks(source, tmp_path):
    train, held_out = split_sequences(source, 0.6)
    write_subset(source, train, tmp_path / "train", seed=0, note="")
    write_subset(source, held_out, tmp_path / "held", seed=0, note="")
    drawn = sample_sequences(source, sequences=2, whole_batches=True)
    write_subset(source, drawn, tmp_path / "drawn", seed=0, note="")

    parts = [Trace.open(tmp_path / name) for name in ("train", "held")]
    real = [(p.routing_arrays().position >= 0).sum() for p in (*parts, source)]
    assert real[0] + real[1] == real[2]
    require_sizes(Trace.open(tmp_path / "drawn"))


def test_parts_put_together_are_the_whole_again(source, tmp_path):
    for name, chosen in (("a", [0, 1]), ("b", [2, 3]), ("c", [4])):
        write_subset(source, chosen, tmp_path / name, seed=0, note="")
    parts = [Trace.open(tmp_path / name) for name in "abc"]

    merge_traces(parts, tmp_path / "all")

    merged = Trace.open(tmp_path / "all")
    require_sizes(merged)
    ours, theirs = merged.routing_arrays(), source.routing_arrays()
    for name in ("step", "layer", "sequence", "position", "experts"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_torn_part_merged_with_a_whole_one_keeps_its_sizes(source, tmp_path):
    write_subset(source, [0], tmp_path / "torn", seed=0, note="")
    write_subset(source, [2, 3], tmp_path / "whole", seed=0, note="")

    merge_traces([Trace.open(tmp_path / "whole"), Trace.open(tmp_path / "torn")], tmp_path / "both")

    both = Trace.open(tmp_path / "both")
    require_sizes(both)
    assert not both.has_times
