"""Budgets as people write them: every form, and what is said of the others."""

import pytest
from expertflow.simulator.budget import parse_budget
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.tracer.errors import UsageError

SHAPE = tiny_shape(4, 16)  # 64 experts of 1 MiB


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("0.5", 32),
        (".5", 32),
        ("1", 64),
        ("1.0", 64),
        ("50%", 32),
        ("12.5%", 8),
        ("100%", 64),
        ("0.3", 19),  # rounded down: a budget is never exceeded
        ("0.001", 1),  # but one slot there always is
        ("1slot", 1),
        ("12slots", 12),
        ("12 slots", 12),
        ("9999slots", 64),
        ("10MiB", 10),
        ("10.9MiB", 10),
        ("10 MB", 9),
        ("1GiB", 64),
        (" 0.5 ", 32),
    ],
)
def test_every_form_gives_slots(text, slots):
    assert parse_budget(text, SHAPE) == slots


def test_share_of_thirds_is_not_lost_to_rounding():
    shape = tiny_shape(3, 10)

    assert [parse_budget(str(share / 10), shape) for share in (1, 3, 6, 7)] == [3, 9, 18, 21]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "a share lies above 0 and at most at 1"),
        ("1.5", "for slots write 128slots"),
        ("150%", "a share lies above 0 and at most at 1"),
        ("0slots", "at least one slot is needed"),
        ("12", "for slots write 128slots"),
        ("100KiB", "one expert of this model takes 1048576 bytes"),
        ("-0.5", "none of the three forms"),
        ("half", "none of the three forms"),
        ("", "none of the three forms"),
        ("6gib", "none of the three forms"),
        ("1e3slots", "none of the three forms"),
        ("nan", "none of the three forms"),
    ],
)
def test_other_budgets_are_refused_with_the_reason_and_what_is_allowed(text, why):
    with pytest.raises(UsageError) as caught:
        parse_budget(text, SHAPE)

    message = str(caught.value)
    assert repr(text.strip()) in message
    assert why in message
    assert all(form in message for form in ("0.5", "128slots", "6GiB"))
