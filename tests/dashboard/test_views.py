"""Every page on a demo folder, an empty one and a broken one: no exception, and the right words."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expertflow.dashboard import parts, words
from expertflow.dashboard.views import overview, verify
from expertflow.simulator.result import Check
from expertflow.simulator.saturation import Load, ServedTimes, judge_arrivals
from expertflow.tracer.records import write_json
from streamlit.testing.v1 import AppTest

from .conftest import make_tuning, make_verdict

REPO = Path(__file__).resolve().parents[2]
PAGES = {
    "overview": "Overview",
    "routing": "Routing",
    "timeline": "Timeline",
    "capacity": "Capacity",
    "what_if": "What-if",
    "sweep": "Sweep",
    "policy": "Policy",
    "verify": "Verify",
    "compare": "Compare",
    "live": "Live",
}
PATIENCE_S = 300
"""The simulator may have to be compiled first."""


def open_page(page: str, folder: Path) -> AppTest:
    return page_app(page, folder).run()


def page_app(page: str, folder: Path) -> AppTest:
    script = f"""
from pathlib import Path
from expertflow.dashboard.data import discover
from expertflow.dashboard.views import {page}
{page}.render(discover(Path({str(folder)!r})))
"""
    return AppTest.from_string(script, default_timeout=PATIENCE_S)


def titles(app: AppTest) -> str:
    specs = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    return " ".join(spec["layout"]["title"]["text"] for spec in specs)


def text(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.warning, app.info, app.error, app.success, app.code)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("state", ["demo", "empty", "broken"])
def test_every_page_opens_on_every_folder(
    page: str, state: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "none" if state == "empty" else request.getfixturevalue(state)
    folder.mkdir(exist_ok=True)
    app = open_page(page, folder)
    assert not app.exception
    assert app.title[0].value == PAGES[page]


def test_app_offers_every_page(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTFLOW_DATA", str(demo))
    app = AppTest.from_file(str(REPO / "dashboard" / "app.py"), default_timeout=PATIENCE_S).run()
    assert not app.exception
    assert app.title[0].value == "Overview"


def test_overview_shows_the_way_from_baseline_to_measured(demo: Path) -> None:
    app = open_page("overview", demo)
    assert [metric.value for metric in app.metric] == [
        "9.4 tokens/s",
        "27.9 tokens/s",
        "27.9 tokens/s",
        "26.8 tokens/s",
    ]
    assert "Decode: the busiest 10 % of experts" in titles(app)
    assert "perfect foresight 83 %" in titles(app)
    assert "declared from a data sheet" in text(app)
    assert "expertflow-trace deploy" in text(app)


def test_every_chart_has_words_for_those_who_cannot_see_it(demo: Path) -> None:
    for page in PAGES:
        charts = open_page(page, demo).get("plotly_chart")
        assert charts
        assert all(chart.proto.alt for chart in charts)
        assert all('"showSendToCloud": false' in chart.proto.config for chart in charts)


def test_phase_and_order_change_the_heatmap(demo: Path) -> None:
    app = open_page("overview", demo)
    app.get("button_group")[0].set_value("prefill").run()
    assert not app.exception
    assert "Prefill: the busiest" in titles(app)


def test_domain_changes_the_heatmap(demo: Path) -> None:
    app = open_page("overview", demo)
    before = titles(app)
    app.selectbox(key="domain").set_value("code").run()
    assert titles(app) != before


def test_state_comes_from_the_address(demo: Path) -> None:
    app = open_page("overview", demo)
    app.query_params["phase"] = "prefill"
    app.run()
    fresh = AppTest.from_string(
        f"""
from pathlib import Path
from expertflow.dashboard.data import discover
from expertflow.dashboard.views import overview
overview.render(discover(Path({str(demo)!r})))
""",
        default_timeout=PATIENCE_S,
    )
    fresh.query_params["phase"] = "prefill"
    assert "Prefill: the busiest" in titles(fresh.run())


def test_verify_says_yes(demo: Path) -> None:
    app = open_page("verify", demo)
    assert "Validated." in app.success[0].value
    assert "18 of 18 checks" in titles(app)
    assert words.EMULATED in text(app)


def test_verify_says_no_and_why(demo: Path) -> None:
    app = open_page("verify", demo)
    app.selectbox(key="verdict").set_value("other-verdict.json").run()
    assert "NOT validated." in app.error[0].value
    assert "lfu: tokens/s predicted 20.6 % too high" in text(app)
    assert "copies slower than the traced link" in app.table[2].value.to_string()


def test_verify_shows_latencies_of_requests_and_what_is_not_judged(tmp_path: Path) -> None:
    verdict = make_verdict("t", validated=True)
    late = Check(
        quantity="ttft_p99_s",
        unit="s",
        predicted=0.4,
        measured=0.2,
        gap=1.0,
        tolerance=0.8,
        noise=0.1,
        passed=False,
        cause="at this load",
        is_judged=False,
    )
    runs = [replace(run, checks=(*run.checks, late)) for run in verdict.runs]
    served = replace(
        verdict.runs[0].predicted,
        arrivals=judge_arrivals(
            ServedTimes(*(np.arange(4.0) + seconds for seconds in (0, 0.1, 0.2))),
            Load(description="", users=None, busy_s=1.0, mean_batch=1.0, mixed_tokens=0),
        ),
    )
    runs[0] = replace(runs[0], predicted=served)
    write_json(tmp_path / "v.json", replace(verdict, runs=tuple(runs), arrivals="Poisson, 2/s"))

    app = open_page("verify", tmp_path)

    rows = app.table[0].value.loc["time to first token p99"]
    shown = [rows[name] for name in ("predicted", "measured", "pass")]
    assert shown == ["400 ms", "200 ms", "– not judged"]
    assert "Predicted: Keeps up: requests arrive at 1/s" in text(app)
    assert "18 of 18 checks" in titles(app)
    assert not app.error


def test_empty_folders_name_the_commands(tmp_path: Path) -> None:
    assert parts.FILL_TRACE in text(open_page("overview", tmp_path))
    everything = text(open_page("verify", tmp_path))
    for command in (parts.FILL_TRACE, parts.FILL_TUNING, parts.FILL_VERDICT):
        assert command in everything


def test_a_trace_without_tuning_names_the_next_command(tmp_path: Path) -> None:
    from expertflow.tracer.synthetic import synthetic_trace

    synthetic_trace(tmp_path / "only")
    assert parts.FILL_TUNING in text(open_page("overview", tmp_path))


def test_broken_folders_name_the_files_and_show_the_rest(broken: Path) -> None:
    app = open_page("overview", broken)
    words_shown = text(app)
    for name in ("cut/routing/part-00000.parquet", "torn/manifest.json", "verdict.json"):
        assert name in words_shown
    assert "Traceback" not in words_shown
    assert "perfect foresight" in titles(app)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_hides_what_is_broken(broken: Path, page: str) -> None:
    words_shown = text(open_page(page, broken))
    assert "torn/manifest.json" in words_shown
    assert "Traceback" not in words_shown


def test_a_broken_sweep_is_named_and_the_others_are_offered(broken: Path) -> None:
    assert "swept: rows" in text(open_page("sweep", broken))


@pytest.mark.parametrize(
    ("page", "command"),
    [
        ("routing", parts.FILL_TRACE),
        ("timeline", parts.FILL_TRACE),
        ("capacity", parts.FILL_TRACE),
        ("what_if", parts.FILL_TRACE),
        ("sweep", parts.FILL_SWEEP),
        ("policy", parts.FILL_TUNING),
        ("compare", "expertflow-trace simulate"),
        ("live", parts.FILL_TRACE),
        ("live", "expertflow-trace deploy"),
    ],
)
def test_an_empty_page_names_the_command_that_fills_it(
    tmp_path: Path, page: str, command: str
) -> None:
    assert command in text(open_page(page, tmp_path))


def test_routing_answers_in_its_titles(demo: Path) -> None:
    app = open_page("routing", demo)
    found = titles(app)
    assert "Used again in the very next pass" in found
    assert "Layer 0 foretells" in found
    app.slider(key="layer").set_value(2).run()
    assert "Layer 2 foretells" in titles(app)
    app.slider(key="layer").set_value(3).run()
    assert "is the last one" in text(app)


def test_capacity_says_how_much_memory_is_needed(demo: Path) -> None:
    app = open_page("capacity", demo)
    app.slider(key="wanted").set_value(10).run()
    assert "you need" in app.success[0].value
    app.slider(key="wanted").set_value(100).run()
    assert "No cache reaches" in app.warning[0].value


def test_what_if_answers_when_a_slider_moves(demo: Path) -> None:
    app = open_page("what_if", demo)
    before = [metric.value for metric in app.metric]
    app.slider(key="budget").set_value(25).run()
    after = [metric.value for metric in app.metric]
    assert not app.exception
    assert before != after
    app.selectbox(key="predictor").set_value("synthetic").run()
    assert not app.exception
    assert "SYNTHETIC predictor" in text(app)
    assert "--predictor-param recall=0.8" in text(app)
    assert "cannot be deployed" in text(app)


def test_what_if_keeps_its_settings_in_the_address(demo: Path) -> None:
    app = page_app("what_if", demo)
    app.query_params["budget"] = "25"
    app.query_params["link"] = "pcie4x16"
    shown = text(app.run())
    assert "16 of 64 experts" in shown
    assert "--link pcie4x16" in shown


def test_timeline_tells_why_each_expert_was_loaded(demo: Path) -> None:
    app = open_page("timeline", demo)
    shown = text(app)
    assert "SIMULATED run" in shown
    assert "because the router chose it and it was not resident" in shown
    app.number_input(key="explain").set_value(3).run()
    assert "Pass 3" in text(app)
    app.get("button_group")[0].set_value("recorded").run()
    assert not app.exception
    assert "RECORDED run" in text(app)
    assert "Recorded (solid)" in titles(app)


def test_policy_explains_itself(demo: Path) -> None:
    app = open_page("policy", demo)
    assert "keep 32 on the device" in text(app)
    assert "expertflow-trace deploy" in text(app)
    assert "Every layer has 8 slots of its own" in titles(app)


def test_sweep_shows_the_front_and_what_matters(demo: Path) -> None:
    app = open_page("sweep", demo)
    assert "configurations are beaten by none in both" in titles(app)
    assert "slots matters most" in titles(app)
    assert "1 configurations failed" in text(app)
    app.selectbox(key="objective").set_value("decode_hit_rate").run()
    assert "explains 100 %" in titles(app)


def test_compare_names_only_what_differs(demo: Path) -> None:
    app = open_page("compare", demo)
    table = app.dataframe[0].value
    assert "source" in table.index
    assert "model_id" not in table.index
    assert "is the fastest" in titles(app)


def test_results_without_their_trace_are_shown(tmp_path: Path) -> None:
    write_json(tmp_path / "tuning.json", make_tuning("elsewhere"))
    app = open_page("overview", tmp_path)
    assert not app.exception
    assert "not in this folder" in text(app)
    assert "perfect foresight" in titles(app)


def test_baseline_is_the_one_that_keeps_nothing() -> None:
    found = overview.baseline(make_tuning("t"))
    assert found is not None
    assert found.label == "none"


def test_a_good_verdict_has_no_reasons_against_it() -> None:
    assert verify.reasons(make_verdict("t", validated=True)) == []


def test_dashboard_stands_on_tracer_and_simulator_only() -> None:
    for path in (REPO / "dashboard").rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        firsts = {part for name in names for part in name.split(".")[:2]}
        assert not firsts & {"torch", "simpy", "transformers", "runtime"}, path
