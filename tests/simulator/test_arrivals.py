"""When requests arrive: drawn, spaced, one after another, or read from a file."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from expertflow.simulator.arrivals import Arrival, read_arrivals
from expertflow.tracer.errors import InputError, UsageError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "arrivals"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.4799609,3180,8\r
2023-11-16 18:17:03.4799600,110,27\r
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 4000, "input_length": 23, "output_length": 1}
"""


def times(found) -> list[float]:
    return [request.time_s for request in found.requests]


# --- without a file ----------------------------------------------------------------------------


def test_requests_come_at_even_intervals():
    found = read_arrivals("every:0.5", limit=4)

    assert found.requests == tuple(Arrival(time_s) for time_s in (0.0, 0.5, 1.0, 1.5))
    assert found.users is None
    assert not found.has_lengths


def test_poisson_arrivals_have_the_rate_asked_for_and_no_memory():
    found = read_arrivals("poisson:4", limit=20_000, seed=3)

    gaps = np.diff(times(found))
    assert times(found)[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.03)


def test_poisson_arrivals_are_those_of_their_seed():
    first, same, other = (read_arrivals("poisson:4", limit=9, seed=seed) for seed in (1, 1, 2))

    assert first == same
    assert times(first) != times(other)


def test_more_requests_begin_with_the_same_ones():
    few, many = (read_arrivals("poisson:4", limit=limit) for limit in (5, 50))

    assert many.requests[:5] == few.requests


def test_a_closed_loop_has_users():
    found = read_arrivals("closed:8", limit=20)

    assert (found.users, len(found.requests)) == (8, 20)


@pytest.mark.parametrize("form", ["poisson:4", "every:3"])
def test_arrivals_twice_as_fast_take_half_the_time(form):
    usual, fast = (read_arrivals(form, limit=9, speed=speed) for speed in (1.0, 2.0))

    assert [2 * time_s for time_s in times(fast)] == pytest.approx(times(usual))
    assert "2× as fast" in fast.description


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("poison:3", "Did you mean 'poisson'"),
        ("hourly", "expected poisson:RATE"),
        ("", "expected poisson:RATE"),
        ("poisson", "above 0, got ''"),
        ("poisson:fast", "above 0, got 'fast'"),
        ("poisson:0", "above 0, got '0'"),
        ("poisson:inf", "above 0, got 'inf'"),
        ("every:-1", "seconds above 0, got '-1'"),
        ("closed:0", "at least 1, got '0'"),
        ("closed:2.5", "whole number of users, at least 1, got '2.5'"),
    ],
)
def test_what_is_no_form_of_arrivals_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        read_arrivals(text, limit=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"limit": 0}, "at least 1, got 0"),
        ({"limit": None}, "go on for ever"),
        ({"limit": 3, "speed": 0.0}, "above 0, got 0"),
        ({"limit": 3, "speed": float("nan")}, "above 0, got nan"),
    ],
)
def test_limits_and_speeds_that_cannot_be_are_refused(given, said):
    with pytest.raises(UsageError, match=said):
        read_arrivals("every:1", **given)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_azure_rows_count_from_the_first_to_arrive(tmp_path, packed):
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(AZURE.encode()) if packed else AZURE.encode())

    found = read_arrivals(str(path), limit=None)

    # In order of time, in microseconds at best.
    assert found.requests == (
        Arrival(0.0, 110, 27),
        Arrival(0.5, 4808, 10),
        Arrival(pytest.approx(1.0), 3180, 8),
    )
    assert found.has_lengths
    assert found.description == path.name


@pytest.mark.parametrize("packed", [False, True])
def test_mooncake_lines_count_from_the_first(tmp_path, packed):
    path = tmp_path / ("m.jsonl.gz" if packed else "m.jsonl")
    path.write_bytes(gzip.compress(MOONCAKE.encode()) if packed else MOONCAKE.encode())

    found = read_arrivals(str(path), limit=None, speed=2.0)

    assert found.requests == (Arrival(0.0, 6758, 500), Arrival(1.5, 23, 1))


def test_a_limit_takes_the_first_requests_of_a_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(AZURE)

    assert len(read_arrivals(str(path), limit=2).requests) == 2
    assert len(read_arrivals(str(path), limit=9).requests) == 3


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "no column TIMESTAMP"),
        ("a.csv", HEAD, "holds no requests"),
        ("a.csv", "TIMESTAMP,Context\n1,2\n", "ContextTokens, GeneratedTokens; it has TIMESTAMP"),
        ("a.csv", HEAD + "noon,3,4\n", "line 2: TIMESTAMP is 'noon'"),
        ("a.csv", HEAD + "2023-11-16 18:17:03,3\n", "line 2: GeneratedTokens is None"),
        ("a.csv", HEAD + "2023-11-16 18:17:03,3,x\n", "GeneratedTokens is 'x'; expected a whole"),
        ("a.csv", HEAD + "2023-11-16 18:17:03,0,4\n", "ContextTokens is '0'; expected a whole"),
        (
            "a.csv",
            HEAD + "2023-11-16 18:17:03,1,4\n2023-11-16 18:17:03+00:00,1,4\n",
            "line 3: TIMESTAMP",
        ),
        ("a.jsonl", "", "holds no requests"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", MOONCAKE + "{oops\n", "line 3 is not a JSON object"),
        ("a.jsonl", '{"timestamp": 0}\n', "no input_length, output_length"),
        (
            "a.jsonl",
            '{"timestamp": "now", "input_length": 1, "output_length": 1}\n',
            "timestamp is 'now'; expected milliseconds",
        ),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 1.5, "output_length": 1}\n',
            "input_length is 1.5; expected a whole number",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)

    with pytest.raises(InputError, match=said) as stop:
        read_arrivals(str(path), limit=None)

    assert str(path) in str(stop.value)


@pytest.mark.parametrize("name", ["gone.csv", "gone.jsonl.gz"])
def test_a_file_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} cannot be read: No such file"):
        read_arrivals(str(tmp_path / name), limit=3)


@pytest.mark.parametrize("damage", [lambda body: body[:-9], lambda body: b"plain text"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(damage(gzip.compress(AZURE.encode())))

    with pytest.raises(InputError, match="damaged"):
        read_arrivals(str(path), limit=3)


@pytest.mark.skipif(not REAL.is_dir(), reason="the published arrival files are not here")
@pytest.mark.parametrize(
    ("name", "count", "last_s"),
    [
        ("AzureLLMInferenceTrace_code_2023.csv.gz", 8819, 3435),
        ("AzureLLMInferenceTrace_conv_2023.csv.gz", 19366, 3502),
        ("mooncake_conversation_trace.jsonl.gz", 12031, 3537),
        ("mooncake_synthetic_trace.jsonl.gz", 3993, 1022),
    ],
)
def test_published_files_are_read_whole(name, count, last_s):
    found = read_arrivals(str(REAL / name), limit=None)

    assert len(found.requests) == count
    assert found.has_lengths
    assert times(found) == sorted(times(found))
    assert times(found)[-1] == pytest.approx(last_s, abs=1)
