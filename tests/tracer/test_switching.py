"""How soon waking threads get their turn: shortened while a copy thread lives, given back after."""

import sys
import time

import pytest
from expertflow.tracer.copies import ThreadCopyEngine
from expertflow.tracer.switching import SWITCH_S, hasten, relax


@pytest.fixture(autouse=True)
def interval():
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(before)


def test_a_copy_thread_shortens_the_interval_while_it_lives():
    engine = ThreadCopyEngine(time.perf_counter)
    while_it_lives = sys.getswitchinterval()
    engine.close()

    assert while_it_lives == pytest.approx(SWITCH_S)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_the_last_of_several_gives_it_back():
    first, second = ThreadCopyEngine(time.perf_counter), ThreadCopyEngine(time.perf_counter)
    first.close()
    with_one_left = sys.getswitchinterval()
    second.close()

    assert with_one_left == pytest.approx(SWITCH_S)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_closing_twice_gives_back_once():
    first, second = ThreadCopyEngine(time.perf_counter), ThreadCopyEngine(time.perf_counter)
    first.close()
    first.close()
    with_one_left = sys.getswitchinterval()
    second.close()

    assert with_one_left == pytest.approx(SWITCH_S)


def test_an_interval_that_is_shorter_already_stays():
    sys.setswitchinterval(1e-6)

    hasten()
    during = sys.getswitchinterval()
    relax()

    assert during == sys.getswitchinterval() == pytest.approx(1e-6)
