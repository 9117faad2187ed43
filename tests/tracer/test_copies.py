"""The CPU's copy engine: bytes, order, promotion, cancelling and times. Lower bounds only: CI is busy."""

import threading
import time

import pytest
import torch
from expertflow.tracer.copies import Copy, ThreadCopyEngine, copy_engine
from expertflow.tracer.errors import UsageError
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.types import ExpertKey
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 64_000
SLOW = LinkSpec("slow", bandwidth_Bps=6.4e6, latency_s=0.0)
"""10 ms per copy of SIZE."""


def made(number: int, why="demand", *, size: int = SIZE, target=None) -> Copy:
    generator = torch.Generator().manual_seed(number)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    if target is None:
        target = torch.zeros(size, dtype=torch.uint8)
    return Copy(ExpertKey(0, number), source, target, why, step=0)


@pytest.fixture
def make_engine():
    engines = []

    def make(**more) -> ThreadCopyEngine:
        engines.append(ThreadCopyEngine(time.perf_counter, **more))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def is_whole(copy: Copy) -> bool:
    return torch.equal(copy.source, copy.target)


def end_order(copies) -> list[int]:
    return [copy.key.expert for copy in sorted(copies, key=lambda copy: copy.end_s)]


@pytest.mark.parametrize("chunk", [1, 1000, SIZE - 1, SIZE, 10**9])
@pytest.mark.parametrize("link", [None, LinkSpec("fast", 1e12, 0.0)])
def test_bytes_arrive_whole_whatever_the_chunk(make_engine, chunk, link):
    size = 3000 if chunk == 1 else SIZE
    engine = make_engine(chunk_bytes=chunk, link=link)
    copies = [made(n, size=size) for n in range(3)]

    engine.submit(copies)
    engine.wait(copies)

    assert all(is_whole(copy) for copy in copies)
    assert [copy.moved for copy in copies] == [size] * 3


def test_submitting_nothing_is_nothing(make_engine):
    engine = make_engine()

    engine.submit([])
    engine.wait([])

    assert engine.take_records() == []


def test_times_follow_each_other(make_engine):
    engine = make_engine(link=LinkSpec("x", 6.4e8, 1e-4))
    before = time.perf_counter()
    copies = [made(n, "prefetch" if n % 2 else "demand") for n in range(6)]

    engine.submit(copies)
    engine.wait(copies)
    after = time.perf_counter()

    for copy in copies:
        assert before <= copy.queued_s <= copy.start_s <= copy.end_s <= after
        assert before <= copy.needed_s <= after
    assert sorted(c.key.expert for c in engine.take_records()) == list(range(6))
    assert engine.take_records() == []


def test_demand_goes_before_every_prefetch_that_waits(make_engine):
    engine = make_engine(link=SLOW)
    first, late, urgent = made(0, "demand"), made(1, "prefetch"), made(2, "demand")

    engine.submit([first, late])
    engine.submit([urgent])
    engine.wait([first, late, urgent])

    assert end_order([first, late, urgent]) == [0, 2, 1]


def test_demand_interrupts_a_prefetch_at_a_chunk(make_engine):
    engine = make_engine(link=SLOW, chunk_bytes=SIZE // 8)
    prefetch = made(0, "prefetch", size=8 * SIZE)  # 80 ms in 80 chunks
    urgent = made(1)

    engine.submit([prefetch])
    until_started(prefetch)
    engine.submit([urgent])
    engine.wait([urgent])
    was_pending = not prefetch.done.is_set()
    engine.wait([prefetch])

    assert was_pending
    assert urgent.end_s < prefetch.end_s
    assert prefetch.start_s < urgent.start_s
    assert is_whole(prefetch)
    assert is_whole(urgent)


def until_started(copy: Copy) -> None:
    until = time.monotonic() + 20
    while copy.moved == 0 and time.monotonic() < until:
        time.sleep(0.0005)
    assert copy.moved > 0


def test_demand_is_not_interrupted_by_demand(make_engine):
    engine = make_engine(link=SLOW, chunk_bytes=SIZE // 8)
    first, second = made(0), made(1)

    engine.submit([first])
    engine.submit([second])
    engine.wait([first, second])

    assert end_order([first, second]) == [0, 1]
    assert second.start_s >= first.start_s + 0.01 * (1 - 1e-9)


def test_promoted_prefetch_overtakes_the_others(make_engine):
    engine = make_engine(link=SLOW)
    running = made(0)
    waiting = [made(n, "prefetch") for n in (1, 2, 3)]

    engine.submit([running, *waiting])
    engine.promote(waiting[2])
    engine.wait([running, *waiting])

    assert end_order([running, *waiting]) == [0, 3, 1, 2]
    assert waiting[2].is_urgent


def test_promoted_prefetch_is_no_longer_interrupted(make_engine):
    engine = make_engine(link=SLOW, chunk_bytes=SIZE // 8)
    prefetch = made(0, "prefetch", size=4 * SIZE)
    urgent = made(1)

    engine.submit([prefetch])
    until_started(prefetch)
    engine.promote(prefetch)
    engine.submit([urgent])
    engine.wait([prefetch, urgent])

    assert prefetch.end_s < urgent.end_s
    assert urgent.start_s >= prefetch.start_s + 0.04 * (1 - 1e-9)
    assert is_whole(prefetch)


def test_cancelled_while_waiting_never_starts_and_releases_waiters(make_engine):
    engine = make_engine(link=SLOW)
    running, cancelled = made(0), made(1, "prefetch")

    engine.submit([running, cancelled])
    engine.cancel(cancelled)
    is_released = cancelled.done.wait(timeout=20)
    engine.wait([running])

    assert is_released
    assert cancelled.moved == 0
    assert not cancelled.target.any()
    assert engine.finished() == []
    assert [copy.key.expert for copy in engine.take_records()] == [0]


def test_slot_of_a_cancelled_copy_can_be_used_at_once(make_engine):
    engine = make_engine(link=SLOW, chunk_bytes=SIZE // 8)
    prefetch = made(0, "prefetch", size=2 * SIZE)

    engine.submit([prefetch])
    until_started(prefetch)
    engine.cancel(prefetch)
    urgent = made(1, size=2 * SIZE, target=prefetch.target)
    engine.submit([urgent])
    engine.wait([urgent])

    assert is_whole(urgent)
    assert prefetch.moved < 2 * SIZE
    assert engine.finished() == []


@settings(max_examples=20, deadline=None)
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["demand", "prefetch", "cancel", "promote"]), st.integers(0, 3)),
        max_size=30,
    ),
)
def test_last_copy_into_every_slot_wins_whatever_was_cancelled_before(actions):
    engine = ThreadCopyEngine(time.perf_counter, link=LinkSpec("x", 2e8, 0.0), chunk_bytes=1024)
    slots = [torch.zeros(4096, dtype=torch.uint8) for _ in range(4)]
    last: dict[int, Copy] = {}
    try:
        for number, (action, slot) in enumerate(actions):
            before = last.get(slot)
            if action == "promote":
                if before is not None and before.why == "prefetch" and not before.is_cancelled:
                    engine.promote(before)
                continue
            if before is not None and not before.done.is_set():
                # As the decision core does: a slot on its way is given up before it is given away.
                if before.why == "demand":
                    engine.wait([before])
                else:
                    engine.cancel(before)
            if action != "cancel":
                last[slot] = made(number, action, size=4096, target=slots[slot])
                engine.submit([last[slot]])
        alive = [copy for copy in last.values() if not copy.is_cancelled]
        engine.wait(alive)
    finally:
        engine.close()

    assert all(is_whole(copy) for copy in alive)


def test_finished_reports_prefetches_once_in_order_of_their_end(make_engine):
    engine = make_engine()
    copies = [made(0, "prefetch"), made(1, "prefetch"), made(2, "demand"), made(3, "prefetch")]

    engine.submit(copies)
    engine.wait(copies)
    finished = engine.finished()

    assert {copy.key.expert for copy in finished} == {0, 1, 3}
    assert [c.key.expert for c in finished] == end_order(finished)
    assert engine.finished() == []


def test_emulated_link_takes_at_least_its_nominal_time(make_engine):
    spec = LinkSpec.parse("20MB/s+2ms")
    engine = make_engine(link=spec)
    copies = [made(n) for n in range(3)]

    began = time.perf_counter()
    engine.submit(copies)
    engine.wait(copies)
    took = time.perf_counter() - began

    nominal = spec.copy_s(SIZE)
    assert nominal == pytest.approx(0.0052)
    assert took >= 3 * nominal
    for copy in copies:
        assert copy.end_s - copy.start_s >= nominal * (1 - 1e-9)


@pytest.mark.parametrize("chunk", [SIZE, SIZE // 8])
def test_late_wake_ups_do_not_add_up_over_back_to_back_copies(make_engine, chunk):
    spec = LinkSpec.parse("40MB/s+100us")
    engine = make_engine(link=spec, chunk_bytes=chunk)
    copies = [made(n) for n in range(12)]

    engine.submit(copies)
    engine.wait(copies)

    # A copy starts when the one before it was due, however late this thread was woken.
    origin = copies[0].start_s
    for number, copy in enumerate(copies):
        assert copy.start_s == pytest.approx(origin + number * spec.copy_s(SIZE), abs=1e-7)


def test_idle_link_starts_a_copy_when_it_is_asked_for(make_engine):
    engine = make_engine(link=SLOW)
    first, second = made(0), made(1)

    engine.submit([first])
    engine.wait([first])
    time.sleep(0.02)
    engine.submit([second])
    engine.wait([second])

    assert second.start_s >= second.queued_s
    assert second.end_s - second.start_s >= 0.01 * (1 - 1e-9)


def test_close_joins_its_thread_and_may_be_called_again():
    before = threading.active_count()
    engine = ThreadCopyEngine(time.perf_counter, link=SLOW)
    engine.submit([made(n, "prefetch") for n in range(50)])

    began = time.perf_counter()
    engine.close()
    engine.close()

    assert threading.active_count() == before
    assert time.perf_counter() - began < 5  # the queue, 500 ms long, was dropped
    assert sum(copy.moved for copy in engine.take_records()) < 50 * SIZE


def test_engine_for_the_cpu_may_be_emulated_and_is_not_pinned():
    engine = copy_engine(torch.device("cpu"), time.perf_counter, pinned=True, link=SLOW)

    assert isinstance(engine, ThreadCopyEngine)
    assert not engine.pinned
    engine.close()


def test_a_link_cannot_be_emulated_on_cuda():
    with pytest.raises(UsageError, match="only be emulated on the CPU"):
        copy_engine(torch.device("cuda"), time.perf_counter, pinned=True, link=SLOW)
