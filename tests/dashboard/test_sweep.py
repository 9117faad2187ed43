"""The sweep page's arithmetic: the front is the simulator's, importance is explained variance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from expertflow.dashboard import parts
from expertflow.dashboard.figures import sweep
from expertflow.dashboard.views import sweep as view
from expertflow.simulator.pareto import pareto
from expertflow.simulator.sweep_row import table_of
from hypothesis import given
from hypothesis import strategies as st

from .conftest import make_rows


@pytest.fixture
def frame() -> pd.DataFrame:
    return view.good_rows(table_of(make_rows()).to_pandas())


@dataclass(frozen=True)
class Spot:
    tokens_per_s: float
    peak_device_bytes: int


spots = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25)


@given(spots)
def test_the_front_is_the_simulators(found: list[tuple[int, int]]) -> None:
    table = pd.DataFrame(found, columns=["tokens_per_s", "peak_device_bytes"]).assign(
        is_bound=False
    )
    shown = sweep.front_of(table, "peak_device_bytes", "tokens_per_s")
    wanted = pareto(
        [Spot(*spot) for spot in found], maximise=("tokens_per_s",), minimise=("peak_device_bytes",)
    )
    assert set(zip(shown["tokens_per_s"], shown["peak_device_bytes"], strict=True)) == {
        (spot.tokens_per_s, spot.peak_device_bytes) for spot in wanted
    }


def test_bounds_are_never_on_the_front(frame: pd.DataFrame) -> None:
    front = sweep.front_of(frame, "peak_device_bytes", "tokens_per_s")
    assert not front["is_bound"].any()
    fig = sweep.pareto(frame, "peak_device_bytes", "tokens_per_s")
    assert f"{len(front)} of 18 configurations" in fig.layout.title.text
    assert "bound: knows the future" in [trace.name for trace in fig.data]


def test_what_decides_alone_explains_everything(frame: pd.DataFrame) -> None:
    found = sweep.importance_frame(frame[~frame["is_bound"]], "decode_hit_rate")
    assert list(found["choice"]) == ["slots"]
    assert found["share"].iloc[0] == pytest.approx(1.0)
    shares = sweep.importance_frame(frame[~frame["is_bound"]], "tokens_per_s")
    # Effects that only add up explain all of the variance between them.
    assert shares["share"].sum() == pytest.approx(1.0)
    assert shares["choice"].iloc[0] == "slots"


def test_large_sweeps_are_thinned_but_for_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [
        replace(
            make_rows()[0],
            key=str(n),
            tokens_per_s=float(rng.random()),
            slots=int(rng.integers(1, 64)),
        )
        for n in range(3000)
    ]
    table = view.good_rows(table_of(rows).to_pandas())
    monkeypatch.setattr(sweep, "MOST_POINTS", 500)
    front = sweep.front_of(table, "slots", "tokens_per_s")
    shown = sweep.drawn(table, front, 500)
    assert len(shown) <= 500
    assert set(front["key"]) <= set(shown["key"])


def test_points_that_were_picked_are_found_by_what_they_carry() -> None:
    points = [{"customdata": ["a", 1]}, {"customdata": "b"}, {"customdata": {"0": "c", "1": 2}}, {}]
    assert parts.picked({"selection": {"points": points}}) == ["a", "b", "c"]
    assert parts.picked(None) == []


def test_coordinates_hold_choices_and_outcomes(frame: pd.DataFrame) -> None:
    fig = sweep.coordinates(frame)
    labels = [dimension.label for dimension in fig.data[0].dimensions]
    assert labels == ["slots", "cache", "predictor", "hits, %", "MiB/token", "peak MiB", "tokens/s"]
