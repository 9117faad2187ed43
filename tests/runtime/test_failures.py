"""What goes wrong on the way: a clear error, and a model, a process and slots that go on as they were."""

import errno
import gc
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from expertflow.runtime import deploy as deploying
from expertflow.runtime.fake import FaultyBlocks
from expertflow.runtime.machine import Machine, generate_all
from expertflow.runtime.session import Session
from expertflow.simulator.policy.replay import replay
from expertflow.tracer.blocks import HostBlocks
from expertflow.tracer.copies import Copy, ThreadCopyEngine
from expertflow.tracer.errors import ResourceError, is_out_of_memory
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.types import ExpertKey

from tests.models import tiny
from tests.runtime.bench import CPU, NEW_TOKENS, SLOW

CHUNK = 1000


def text(bench, session, size=1):
    outputs = generate_all(
        bench.loaded, bench.prompts, observer=session, batch_size=size, max_new_tokens=NEW_TOKENS
    )
    return [one.token_ids for one in outputs]


def copy_of(number: int, why="demand", *, readable=True) -> Copy:
    source = torch.full((3 * CHUNK,), number, dtype=torch.uint8)
    target = torch.zeros(3 * CHUNK, dtype=torch.uint8)
    return Copy(ExpertKey(2, number), source if readable else source.to("meta"), target, why, 0)


@pytest.fixture
def engine():
    made = ThreadCopyEngine(time.perf_counter, chunk_bytes=CHUNK)
    yield made
    made.close()


# --- the copy thread ---------------------------------------------------------------------------


def test_copy_that_fails_reaches_whoever_waits_and_the_engine_goes_on(engine):
    good, bad, after = copy_of(1), copy_of(2, readable=False), copy_of(3)
    engine.submit([good, bad, after])

    with pytest.raises(ResourceError, match=r"Expert 2 of layer 2 could not be copied.*run again"):
        engine.wait([good, bad, after])

    assert torch.equal(good.target, good.source)
    assert torch.equal(after.target, after.source)
    assert [engine.abandon(copy) for copy in (good, bad, after)] == [True, False, True]
    again = copy_of(4)
    engine.submit([again])
    engine.wait([again])
    assert torch.equal(again.target, again.source)


def test_prefetch_that_fails_is_named_and_does_not_count_as_arrived(engine):
    bad, good = copy_of(1, "prefetch", readable=False), copy_of(2, "prefetch")
    engine.submit([bad, good])
    engine.wait([good])

    assert engine.failed() == [bad]
    assert engine.finished() == [good]
    assert engine.failed() == []
    assert next(c for c in engine.take_records() if c is bad).moved == 0


def test_closing_frees_those_who_wait_for_what_will_not_come():
    engine = ThreadCopyEngine(
        time.perf_counter, link=LinkSpec.parse("10KB/s"), chunk_bytes=CHUNK // 10
    )
    copies = [copy_of(n) for n in range(3)]
    engine.submit(copies)
    heard: list[BaseException] = []

    def wait() -> None:
        try:
            engine.wait(copies)
        except ResourceError as error:
            heard.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    engine.close()
    waiting.join(20)

    assert not waiting.is_alive()
    assert "closed" in str(heard[0])
    with pytest.raises(ResourceError, match="closed"):
        engine.submit([copy_of(9)])


# --- a session ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["lru", "none", "lfu", "plec", "arc"])
@pytest.mark.parametrize("slots", [1, 5, 12])
def test_failed_load_ends_the_pass_and_the_next_one_has_the_same_text(bench, slots, cache):
    broken = {ExpertKey(1, expert) for expert in range(bench.shape.num_experts)}
    blocks = FaultyBlocks(bench.machine.blocks, lambda key: key in broken)
    spec = bench.spec(slots, cache, "global")
    session = Session(bench.loaded, blocks, spec, CPU)
    try:
        with pytest.raises(ResourceError, match="of layer 1 could not be copied"):
            text(bench, session)
        assert all(session._core.slot_of(key) is None for key in broken)
        broken.clear()

        assert text(bench, session) == bench.resident[1]
        assert replay(session.log, spec, bench.shape).is_exact
    finally:
        session.close()


def test_failed_prefetches_cost_a_load_and_no_text(bench):
    opened: list[Session] = []
    luck = iter([True, False] * 10_000)

    def fails(key: ExpertKey) -> bool:
        return bool(opened) and opened[0]._core.is_loading(key) and next(luck)

    spec = bench.spec(12, "lru", "global", "gate_lookahead")
    opened.append(Session(bench.loaded, FaultyBlocks(bench.machine.blocks, fails), spec, CPU))
    [session] = opened
    found = []
    try:
        for _ in range(3):
            try:
                found.append(text(bench, session))
            except ResourceError:
                found.append(None)  # it was wanted before its failure was known
        assert replay(session.log, spec, bench.shape).is_exact
    finally:
        session.close()

    assert sum(entry.kind == "lost" for entry in session.log) > 3
    assert all(texts in (None, bench.resident[1]) for texts in found)


def test_error_in_the_computation_leaves_slots_that_can_be_trusted(bench, monkeypatch):
    spec = bench.spec(9, "lru", "global", "gate_lookahead")
    with bench.machine.session(spec) as session:
        handler = bench.loaded.layers[1].module._expertflow_handler
        real, calls = handler.compute.whole, iter(range(100))

        def fails(*told):
            if next(calls) == 2:
                raise torch.OutOfMemoryError("no more")
            return real(*told)

        monkeypatch.setattr(handler.compute, "whole", fails)
        with pytest.raises(torch.OutOfMemoryError):
            text(bench, session)

        assert text(bench, session) == bench.resident[1]
        assert replay(session.log, spec, bench.shape).is_exact


def test_warm_load_that_fails_opens_no_session(bench):
    before = threading.active_count()
    blocks = FaultyBlocks(bench.machine.blocks, lambda key: key.layer == 2)

    with pytest.raises(ResourceError, match="of layer 2"):
        Session(bench.loaded, blocks, bench.spec(24, "static"), CPU)

    assert threading.active_count() == before
    assert bench.loaded.model.config._experts_implementation == "grouped_mm"


def test_slow_link_changes_nothing_but_time(bench):
    bench.machine.link = LinkSpec.parse("2MB/s+1ms")
    try:
        with bench.machine.session(bench.spec(12, "lru", "global", "gate_lookahead")) as session:
            assert text(bench, session) == bench.resident[1]
    finally:
        bench.machine.link = None


def test_slots_that_do_not_fit_are_refused_and_the_model_can_still_be_deployed(bench):
    blocks = FaultyBlocks(bench.machine.blocks, slot_bytes=2**56)
    before = threading.active_count()

    with pytest.raises(
        ResourceError, match=r"8 slots need .* GB on cpu.*smaller --budget"
    ) as error:
        Session(bench.loaded, blocks, bench.spec(8), CPU)

    assert error.value.exit_code == 4
    assert threading.active_count() == before
    with bench.machine.session(bench.spec(8)) as session:
        assert text(bench, session) == bench.resident[1]


def test_memory_that_runs_out_in_torch_is_told_from_a_bug():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)

    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


# --- a full disk -------------------------------------------------------------------------------


class FullDisk:
    """Writes of a kind fail as on a full disk."""

    def __init__(self, real, wanted):
        self._real, self._wanted = real, wanted

    def __call__(self, path, *told, **more):
        if self._wanted in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return self._real(path, *told, **more)


def test_results_on_a_full_disk_are_exit_4_and_leave_nothing_half(
    bench, tmp_path, monkeypatch, capsys
):
    policy = bench.policy_file(tmp_path / "policy.json", bench.spec(8))
    full = FullDisk(Path.write_text, "result.json")
    monkeypatch.setattr(Path, "write_text", lambda path, *a, **k: full(path, *a, **k))

    with pytest.raises(SystemExit) as stop:
        main(
            ["deploy", str(policy), "--prompts", str(bench.prompts_file), "--limit", "1", "--max-new-tokens", "2",
             "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "result.json")]
        )  # fmt: skip

    assert stop.value.code == 4
    assert "No space left on device. Free some space" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_disk_tier_takes_its_room_before_it_is_written_to(tmp_path, monkeypatch):
    """A file that may not grow: what a full disk is to posix_fallocate."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load_model(str(tiny()), device=CPU)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"disk tier needs .*Set TMPDIR") as error:
            HostBlocks(loaded.layers, tier="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(torch.tensor([[5, 6]])).logits).all()


# --- Ctrl-C ------------------------------------------------------------------------------------


def test_interrupt_amid_a_run_ends_with_130_and_gives_the_model_back(
    bench, tmp_path, monkeypatch, capsys
):
    policy = bench.policy_file(tmp_path / "policy.json", bench.spec(12, predictor="gate_lookahead"))
    (tmp_path / "blocks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "blocks"))
    kept: list[Machine] = []

    class Kept(Machine):
        def __init__(self, *told, **more):
            super().__init__(*told, **more)
            kept.append(self)

    count = iter(range(1000))
    begin = Session.begin_step

    def pressed(self, info, tokens=None):
        begin(self, info, tokens)
        if next(count) == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(deploying, "Machine", Kept)
    monkeypatch.setattr(Session, "begin_step", pressed)
    before = threading.active_count()

    with pytest.raises(SystemExit) as stop:
        main(
            ["deploy", str(policy), "--model", str(bench.model), "--prompts", str(bench.prompts_file), "--limit", "2",
             "--max-new-tokens", "4", "--device", "cpu", "--threads", "1", "--link", SLOW.text, "--tier", "disk",
             "--out", str(tmp_path / "result.json")]
        )  # fmt: skip

    words = capsys.readouterr().err
    assert (stop.value.code, "Interrupted" in words, "Traceback" in words) == (130, True, False)
    [machine] = kept
    assert machine.loaded.model.config._experts_implementation == "grouped_mm"
    handlers = [
        name for la in machine.loaded.layers for name in vars(la.module) if "expertflow" in name
    ]
    assert handlers == []
    assert threading.active_count() == before
    assert not (tmp_path / "result.json").exists()
    assert list((tmp_path / "blocks").iterdir()) == []


def test_blocks_nobody_closed_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    blocks = HostBlocks(load_model(str(tiny()), device=CPU).layers, tier="disk")
    there = len(list(tmp_path.iterdir()))
    del blocks
    gc.collect()

    assert (there, list(tmp_path.iterdir())) == (1, [])
