"""Measuring a link: curves around the block size, and never better than the link is."""

import time

import pytest
import torch
from expertflow.tracer.copies import CHUNK_BYTES
from expertflow.tracer.link import measure_link
from expertflow.tracer.quantities import LinkSpec

CPU = torch.device("cpu")
BLOCK = 64 * 1024


@pytest.fixture(scope="module")
def emulated():
    spec = LinkSpec.parse("100MB/s+200us")
    return measure_link(CPU, time.perf_counter, block_bytes=BLOCK, link=spec, repeats=3)


def test_curves_are_measured_idle_and_busy_at_the_blocks_own_size():
    profile = measure_link(CPU, time.perf_counter, block_bytes=BLOCK, repeats=3)

    assert [(curve.pinned, curve.busy) for curve in profile.curves] == [
        (False, False),
        (False, True),
    ]
    for curve in profile.curves:
        sizes = [size for size, _ in curve.points]
        assert BLOCK in sizes
        assert sizes == sorted(sizes)
        assert all(seconds > 0 for _, seconds in curve.points)
    assert profile.origin == "measured"
    assert profile.wake_s >= 0
    assert profile.submit_s >= 0
    assert profile.chunk_bytes == CHUNK_BYTES


def test_emulated_link_says_so_and_is_never_faster_than_asked(emulated):
    assert emulated.origin == "emulated"
    assert emulated.name == "100MB/s+200us"
    for size, seconds in emulated.curve(pinned=False, busy=False).points:
        assert seconds >= (200e-6 + size / 1e8) * (1 - 1e-9)


def test_no_thread_is_left_behind(emulated):
    import threading

    names = [thread.name for thread in threading.enumerate()]

    assert "expertflow-copies" not in names
