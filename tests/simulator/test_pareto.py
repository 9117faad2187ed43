"""The Pareto front keeps exactly what nothing else beats."""

from dataclasses import dataclass

from expertflow.simulator.pareto import pareto
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Thing:
    speed: float
    size: int
    wait: float


things = st.lists(
    st.builds(
        Thing,
        speed=st.integers(0, 5).map(float),
        size=st.integers(0, 5),
        wait=st.floats(0, 1),
    ),
    max_size=30,
)


def dominates(one: Thing, other: Thing) -> bool:
    """As directly as it can be written: nowhere worse, somewhere better."""
    nowhere_worse = one.speed >= other.speed and one.size <= other.size and one.wait <= other.wait
    somewhere_better = one.speed > other.speed or one.size < other.size or one.wait < other.wait
    return nowhere_worse and somewhere_better


@given(things)
def test_front_is_what_no_other_dominates(rows):
    front = pareto(rows, maximise=["speed"], minimise=["size", "wait"])

    wanted = [row for row in rows if not any(dominates(other, row) for other in rows)]
    assert sorted(front, key=repr) == sorted(wanted, key=repr)


@given(things)
def test_front_does_not_depend_on_the_order_of_rows(rows):
    front = pareto(rows, maximise=["speed"], minimise=["size"])
    turned = pareto(rows[::-1], maximise=["speed"], minimise=["size"])

    assert sorted(front, key=repr) == sorted(turned, key=repr)


@given(things)
def test_front_is_best_first_and_with_one_aim_all_equal(rows):
    both = pareto(rows, maximise=["speed"], minimise=["size"])
    one = pareto(rows, maximise=["speed"])

    assert [row.speed for row in both] == sorted((row.speed for row in both), reverse=True)
    assert {row.speed for row in one} == ({max(row.speed for row in rows)} if rows else set())


def test_equal_rows_stay_together():
    same = [Thing(1.0, 1, 0.0), Thing(1.0, 1, 0.5)]

    assert pareto(same, maximise=["speed"], minimise=["size"]) == same
