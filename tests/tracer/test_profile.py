"""A measured machine as a file: what is measured, the lines through it, and its use as a link."""

import json
from pathlib import Path

import pytest
import torch
from expertflow.simulator.hardware import parse_link
from expertflow.tracer.errors import InputError, UsageError
from expertflow.tracer.load import load_model
from expertflow.tracer.main import main
from expertflow.tracer.profile.compute import choice, grid
from expertflow.tracer.profile.document import CopyLine, CopyPoint, Line, Sample
from expertflow.tracer.profile.files import (
    HOME,
    link_of,
    named_path,
    read_profile,
    saved_names,
    write_profile,
)
from expertflow.tracer.profile.fit import drift, fit_copies, fit_experts, fit_line, sample
from expertflow.tracer.profile.measure import (
    ProfileRequest,
    measure_profile,
    stages,
    warnings_of,
)
from expertflow.tracer.quantities import LinkSpec
from hypothesis import given
from hypothesis import strategies as st

from tests.models import tiny

GOLDEN = Path(__file__).parent.parent / "golden" / "profile-v1.json"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def measured():
    request = ProfileRequest(
        name="emulated",
        device=CPU,
        threads=1,
        link=LinkSpec.parse("200MB/s+300us"),
        expert_bytes=64 * 1024,
        repeats=3,
    )
    parts: list[int] = []
    found = measure_profile(request, load_model(str(tiny()), device=CPU), parts.append)
    assert sum(parts) == stages(CPU)
    return found


# --- what is measured ----------------------------------------------------------------------------


def test_copies_are_measured_in_every_condition(measured):
    kinds = {(p.num_bytes, p.pinned, p.busy, p.concurrent) for p in measured.copies}

    sizes = {16_384, 65_536, 131_072, 262_144}
    assert kinds == {(s, False, b, c) for s in sizes for b in (False, True) for c in (1, 4)}
    assert all(p.time.low_s <= p.time.seconds <= p.time.high_s for p in measured.copies)


def test_emulated_link_says_so_and_its_line_finds_the_numbers_it_was_given(measured):
    line = measured.copy_line(busy=False)

    assert (measured.link, measured.link_origin) == ("200MB/s+300us", "emulated")
    assert (line.busy, line.concurrent) == (False, 1)
    # Emulated copies are never quicker than asked for, and waits end a little late.
    for point in measured.copies:
        if point.concurrent == 1:
            assert point.time.seconds >= 300e-6 + point.num_bytes / 2e8 - 1e-9


def test_experts_are_measured_by_tokens_and_distinct_experts(measured):
    shape = (8, 2)

    assert [(p.tokens, p.distinct) for p in measured.experts] == list(grid(*shape))
    assert measured.experts_line.features == ("1", "tokens", "distinct")
    assert min(measured.experts_line.weights) >= 0
    assert measured.launch_s > 0
    assert all(point.time.seconds > 0 for point in measured.readback)


def test_grid_holds_the_fewest_and_the_most_experts_that_tokens_can_choose():
    found = list(grid(num_experts=32, top_k=4))

    assert found[0] == (1, 4)
    assert (4, 4) in found
    assert (4, 16) in found
    assert max(distinct for _, distinct in found) == 32
    assert len(set(found)) == len(found)


@given(st.sampled_from(list(grid(32, 4)) + list(grid(6, 3)) + list(grid(8, 1))))
def test_choice_is_of_exactly_so_many_experts_and_none_twice_by_a_token(point):
    tokens, distinct = point
    top_k = next(
        k for n, k in ((32, 4), (6, 3), (8, 1)) if point in list(grid(n, k)) and distinct >= k
    )

    chosen = choice(tokens, distinct, top_k)

    assert len(chosen.unique()) == distinct
    assert all(len(set(row)) == top_k for row in chosen.tolist())


# --- lines ---------------------------------------------------------------------------------------


@given(
    latency=st.floats(1e-6, 1e-2),
    bandwidth=st.floats(1e7, 1e11),
    sizes=st.sets(st.integers(4096, 2**26), min_size=3, max_size=6),
)
def test_line_through_exact_points_is_found_again(latency, bandwidth, sizes):
    points = [copy_point(size, latency + size / bandwidth) for size in sorted(sizes)]

    line = fit_copies(points)

    assert line.residual < 1e-6
    for point in points:
        at = line.weights[0] + point.num_bytes * line.weights[1]
        assert at == pytest.approx(point.time.seconds, rel=1e-6)


@given(st.lists(st.floats(1e-7, 1.0), min_size=4, max_size=8))
def test_no_weight_is_ever_negative(seconds):
    rows = [(1.0, float(number + 1)) for number in range(len(seconds))]

    line = fit_line(("1", "x"), rows, seconds)

    assert min(line.weights) >= 0
    assert max(line.weights) > 0


def test_experts_line_splits_tokens_from_experts():
    from expertflow.tracer.profile.document import ExpertPoint

    points = [
        ExpertPoint(tokens=t, distinct=d, time=sample([1e-5 + 2e-6 * t + 3e-6 * d] * 3))
        for t, d in grid(32, 4)
    ]

    assert fit_experts(points).weights == pytest.approx((1e-5, 2e-6, 3e-6))


def test_sample_and_drift_are_of_the_repeats():
    assert sample([1.0, 2.0, 3.0, 4.0, 5.0]) == Sample(
        seconds=3.0, low_s=2.0, high_s=4.0, repeats=5
    )
    assert sample([2.0] * 3).spread == 0
    assert drift([1.0, 1.0, 1.5, 1.5]) == pytest.approx(0.5)
    assert drift([1.0]) == 0


def copy_point(size: int, seconds: float) -> CopyPoint:
    return CopyPoint(
        num_bytes=size, pinned=False, busy=False, concurrent=1, time=sample([seconds] * 3)
    )


def copy_line(residual: float) -> CopyLine:
    line = Line(features=("1", "bytes"), weights=(1e-5, 1e-9), residual=residual)
    return CopyLine(pinned=False, busy=False, concurrent=1, line=line)


def test_poor_fits_and_busy_machines_are_warned_of():
    assert warnings_of([copy_line(0.01)], 0.01, 0.1, 0.1) == ()
    [poor] = warnings_of([copy_line(0.01), copy_line(0.4)], 0.01, 0.1, 0.1)
    [busy] = warnings_of([copy_line(0.01)], 0.01, 0.1, 0.9)
    [experts] = warnings_of([copy_line(0.01)], 0.3, 0.1, 0.1)

    assert "1 of 2 lines" in poor
    assert "40%" in poor
    assert "busy" in busy
    assert "experts" in experts


# --- files and links -----------------------------------------------------------------------------


def test_golden_profile_is_read_as_it_was_written(tmp_path):
    found = read_profile(GOLDEN)

    write_profile(tmp_path / "again.json", found)

    assert (tmp_path / "again.json").read_text() == GOLDEN.read_text()
    assert found.format == "expertflow.profile/1"
    assert found.copy_line(busy=True).busy
    link = link_of(str(GOLDEN))
    assert (link.latency_s, link.origin) == (2e-5, "emulated")
    assert link.bandwidth_Bps == pytest.approx(2e9)
    assert link.busy_factor == pytest.approx(1.5)
    assert link.note == (
        f"Link {GOLDEN}: 2GB/s+20us, emulated on Example CPU, 4 cores (cpu) at 2026-01-02T03:04:05+00:00: "
        "2 GB/s and 20 µs a copy."
    )


def test_profile_survives_the_disk(measured, tmp_path):
    write_profile(tmp_path / "p.json", measured)

    assert read_profile(tmp_path / "p.json") == measured


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "expertflow.profile/2"}, "expected 'expertflow.profile/1'"),
        ({"copies": 3}, "copies"),
        ({"threads": "two"}, "threads"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"copy_lines": []}, "no line for its link"),
    ],
)
def test_damaged_profile_is_refused_by_name(tmp_path, change, words):
    document = json.loads(GOLDEN.read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**document, **change}))

    with pytest.raises(InputError, match=words) as refused:
        parse_link(str(tmp_path / "bad.json"))
    assert "bad.json" in str(refused.value)


def test_links_are_profiles_by_file_or_saved_name_beside_the_declared_ones(tmp_path):
    write_profile(named_path("mine"), read_profile(GOLDEN))

    assert saved_names() == ("mine",)
    assert parse_link("mine").bandwidth_Bps == pytest.approx(2e9)
    assert parse_link("mine").origin == "emulated"
    assert parse_link(str(GOLDEN)).copy_s(10**6) == pytest.approx(0.00052)
    assert (parse_link("pcie4x16").origin, parse_link("1GB/s").origin) == ("declared", "declared")
    with pytest.raises(UsageError, match="Unknown link 'yours'"):
        parse_link("yours")
    with pytest.raises(InputError, match="does not exist"):
        parse_link(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("name", ["a/b", "..", "", "x.json", "-x"])
def test_names_that_are_no_file_names_are_refused(name):
    with pytest.raises(UsageError, match="not possible"):
        named_path(name)


# --- the command ---------------------------------------------------------------------------------


def ran(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_command_measures_keeps_and_lists_a_profile(capsys, tmp_path):
    words = ("--model", tiny(), "--repeats", 3, "--threads", 1, "--link", "1GB/s+50us")
    out = tmp_path / "p.json"

    code, printed, err = ran(capsys, "profile", "--out", out, "--name", "mine", *words, "--json")
    listed, table, _ = ran(capsys, "profile", "--list")

    assert (code, listed) == (0, 0), err
    assert read_profile(out) == read_profile(named_path("mine"))
    assert json.loads(printed)["link_origin"] == "emulated"
    assert "mine" in table
    assert "1GB/s+50us (emulated)" in table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--out"),
        (("--name", "a/b"), "not possible"),
        (("--out", "p.json", "--repeats", "1"), "--repeats must be at least 3"),
        (("--out", "p.json", "--expert-bytes", "many"), "many"),
        (("--out", "p.json", "--link", "quick"), "quick"),
    ],
)
def test_impossible_requests_exit_2(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)

    code, _, err = ran(capsys, "profile", *words)

    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "p.json").exists()


def test_simulating_behind_a_profile_shows_where_its_link_was_measured(capsys):
    demo = Path(__file__).parent.parent.parent / "traces" / "demo" / "trace"

    code, out, err = ran(
        capsys, "simulate", demo, "--budget", "0.5", "--link", GOLDEN, "--json"
    )  # fmt: skip

    result = json.loads(out) if code == 0 else {}
    assert code == 0, err
    assert (result["link"], result["link_origin"]) == (str(GOLDEN), "emulated")
    assert any("Example CPU" in words for words in result["warnings"])
