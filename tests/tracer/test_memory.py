"""The peak of working tensors on the CPU: made, dropped, and counted once."""

import pytest
import torch
from expertflow.tracer.generate import Prompt
from expertflow.tracer.load import load_model
from expertflow.tracer.memory import METERED_PASSES, PeakMeter, measure_memory, spread_by_size

from tests.models import tiny

CPU = torch.device("cpu")


def test_peak_is_what_lives_at_once():
    with PeakMeter(CPU) as meter:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = torch.zeros(500)

    assert meter.peak_bytes == 8000
    assert (len(second), len(third)) == (1000, 500)


def test_views_and_weights_are_not_counted_again():
    weight = torch.ones(1000)
    with PeakMeter(CPU) as meter:
        view = weight.view(10, 100)[:5].transpose(0, 1)
        made = view + 1
        again = made.t()[1:]

    assert meter.peak_bytes == 4 * 500
    assert again.shape == (4, 100)


def test_a_view_keeps_its_storage_alive():
    with PeakMeter(CPU) as meter:
        part = torch.zeros(1000)[:1]
        meter.take_peak()
        other = torch.zeros(250)
        peak = meter.take_peak()

    assert peak == 4000 + 1000
    assert (len(part), len(other)) == (1, 250)


def test_peak_is_taken_since_the_last_call():
    with PeakMeter(CPU) as meter:
        kept = torch.zeros(100)
        big = torch.zeros(10_000)
        del big
        first = meter.take_peak()
        small = torch.zeros(50)
        second = meter.take_peak()

    assert (first, second) == (40_400, 600)
    assert meter.peak_bytes == 40_400
    assert (len(kept), len(small)) == (100, 50)


def test_work_in_place_makes_nothing():
    with PeakMeter(CPU) as meter:
        made = torch.zeros(1000)
        made.add_(1).mul_(2)

    assert meter.peak_bytes == 4000


def test_longer_prompts_take_more_in_every_measured_pass():
    loaded = load_model(str(tiny()), device=CPU)
    short = [Prompt(0, tuple(range(10, 14)))]
    long = [Prompt(0, tuple(range(10, 74)))]

    points = measure_memory(loaded, [short, long], CPU)

    assert len(points) == 2 * METERED_PASSES
    assert [p.phase for p in points] == ["prefill", "decode", "decode"] * 2
    assert points[3].activation_bytes > 4 * points[0].activation_bytes
    assert all(p.activation_bytes > 0 for p in points)


def test_measuring_twice_gives_the_same_numbers():
    loaded = load_model(str(tiny()), device=CPU)
    batch = [Prompt(0, (5, 6, 7)), Prompt(1, (8,))]

    assert measure_memory(loaded, [batch], CPU) == measure_memory(loaded, [batch], CPU)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_spread_keeps_the_largest_batch_and_at_most_as_many_as_asked(count):
    batches = [[Prompt(n, (1,) * length)] for n, length in enumerate([5, 2, 9, 1, 7])]

    chosen = spread_by_size(batches, count)

    assert len(chosen) == count
    assert chosen[-1] == batches[2]
    assert len({batch[0].sequence for batch in chosen}) == count
