"""The palette: readable on both backgrounds, and apart for colour-blind eyes."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from expertflow.dashboard import theme

REPO = Path(__file__).resolve().parents[2]
# Machado, Oliveira & Fernandes 2009, full deuteranopia and protanopia, on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def backgrounds() -> dict[str, str]:
    config = tomllib.loads((REPO / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    return {name: config["theme"][name]["backgroundColor"] for name in ("light", "dark")}


@pytest.mark.parametrize("meaning", sorted(theme.MEANING))
@pytest.mark.parametrize("base", ["light", "dark"])
def test_marks_stand_out_on_both_backgrounds(meaning: str, base: str) -> None:
    assert contrast(theme.MEANING[meaning], backgrounds()[base]) >= 3


@pytest.mark.parametrize("sight", sorted(SIGHT))
@pytest.mark.parametrize(
    "group", [("hit", "late", "miss"), ("compute", "wait", "prefetch", "other")]
)
def test_neighbours_differ_for_every_eye(sight: str, group: tuple[str, ...]) -> None:
    seen = {name: lab(SIGHT[sight] @ linear(theme.MEANING[name])) for name in group}
    for a, b in itertools.combinations(group, 2):
        assert np.linalg.norm(seen[a] - seen[b]) >= 10, (a, b)


def test_no_figure_offers_an_upload() -> None:
    assert theme.CONFIG["showSendToCloud"] is False
    assert theme.CONFIG["displaylogo"] is False


def test_finish_keeps_the_background_clear() -> None:
    fig = theme.finish(go.Figure(), ["A finding"], height=100)
    assert fig.layout.paper_bgcolor == theme.CLEAR
    assert fig.layout.title.text == "<b>A finding</b>"


def test_shipped_settings_stay_local() -> None:
    config = tomllib.loads((REPO / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False
    assert config["client"]["showErrorLinks"] is False
