"""Sizes, links and durations as people write them."""

import pytest
from expertflow.tracer.errors import UsageError
from expertflow.tracer.quantities import LinkSpec, format_bytes, format_seconds, parse_bytes
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0B", 0),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1.5 MiB", 1_572_864),
        ("6GiB", 6 * 2**30),
        (" 2e3MB ", 2 * 10**9),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "6", "GiB", "-1GiB", "6 gib", "6GiB/s", "1,5GB", "6GiB x"])
def test_other_sizes_are_refused_with_an_example(text):
    with pytest.raises(UsageError, match="for example 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [
        ("8GB/s", 8e9, 0.0),
        ("8GB/s+10us", 8e9, 1e-5),
        ("0.5GiB/s+1.5ms", 2**29, 1.5e-3),
        ("100MB/s+20µs", 1e8, 2e-5),
        ("1KB/s+0ns", 1e3, 0.0),
    ],
)
def test_links_are_read(text, bandwidth, latency):
    link = LinkSpec.parse(text)

    assert link.bandwidth_Bps == pytest.approx(bandwidth)
    assert link.latency_s == pytest.approx(latency)
    assert link.text == text


@pytest.mark.parametrize("text", ["", "8GB", "0GB/s", "fast", "8GB/s+", "8GB/s+10", "8GB/s-1us"])
def test_other_links_are_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"for example 8GB/s\+10us"):
        LinkSpec.parse(text)


def test_a_copy_costs_latency_and_bytes():
    assert LinkSpec.parse("1GB/s+1ms").copy_s(10**6) == pytest.approx(0.002)


@given(st.integers(1, 10**15))
def test_sizes_for_people_read_back_within_rounding(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=6e-3)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (6144, "6.14 KB"), (999_999, "1000 KB"), (7e9, "7 GB")],
)
def test_sizes_are_shown_in_their_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (2.0, "2 s"),
        (0.0125, "12.5 ms"),
        (3e-6, "3 µs"),
        (4e-8, "40 ns"),
        (3600.0, "3600 s"),
    ],
)
def test_durations_are_shown_in_their_unit(seconds, text):
    assert format_seconds(seconds) == text
