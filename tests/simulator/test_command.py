"""`simulate`, `tune` and `list` as they are typed: streams, exit codes and what the JSON holds."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from expertflow.simulator.hardware_profiles import GPUS, LINKS
from expertflow.simulator.policy.registry import FAMILIES, caches
from expertflow.simulator.policy.spec import make_spec, read_policy
from expertflow.simulator.space import DEFAULTS
from expertflow.tracer.main import main
from expertflow.tracer.synthetic import synthetic_trace

ALWAYS = {
    "source", "tokens_per_s", "ttft_s", "tpot_s", "hit_rate", "late_rate", "miss_rate",
    "bytes_per_token", "stall_s", "peak_device_bytes", "decode", "prefill", "bounds",
}  # fmt: skip


@pytest.fixture
def command(capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("command") / "t", new_tokens=4, prompt_tokens=4, layers=2
    ).path


def test_simulate_prints_one_json_document_with_every_number(command, small):
    code, out, _ = command("simulate", small, "--cache", "lru", "--budget", "0.5", "--json")

    document = json.loads(out)
    assert code == 0
    assert document.keys() >= ALWAYS
    assert document["source"] == "predicted"
    assert document["slots"] == 16
    assert document["bounds"]["belady_hit_rate"] >= document["hit_rate"] > 0


def test_simulate_prints_a_table_for_people(command, small):
    code, out, _ = command("simulate", small, "--predictor", "gate_lookahead")

    assert code == 0
    for words in ("lru + gate_lookahead @ 16 slots", "tokens/s", "prefill", "decode", "bounds"):
        assert words in out
    assert "declared" in out


@pytest.mark.parametrize("predictor", ["none", "oracle", "gate_lookahead"])
@pytest.mark.parametrize("cache", ["none", "lru", "lfu", "static", "belady"])
def test_simulate_takes_every_member_by_name(command, small, cache, predictor):
    code, out, _ = command(
        "simulate", small, "--cache", cache, "--predictor", predictor,
        "--allocation", "global", "--scheduler", "fcfs", "--budget", "5slots", "--json",
    )  # fmt: skip

    assert code == 0
    assert json.loads(out)["policy"]["cache"] == cache


def test_simulate_writes_the_result_it_prints(command, small, tmp_path):
    _, out, _ = command("simulate", small, "--json", "--out", tmp_path / "result.json")

    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(out)


def test_a_slower_link_is_slower_and_said_to_be_declared(command, small):
    _, fast, _ = command("simulate", small, "--link", "100GB/s", "--json")
    _, slow, _ = command("simulate", small, "--link", "1GB/s+50us", "--json")

    assert json.loads(fast)["tokens_per_s"] > json.loads(slow)["tokens_per_s"]
    assert (json.loads(slow)["link"], json.loads(slow)["link_origin"]) == ("1GB/s+50us", "declared")


def test_tune_writes_a_policy_that_simulate_takes(command, small, tmp_path):
    code, out, err = command("tune", small, "--budget", "0.5", "--out", tmp_path / "policy.json")
    policy = read_policy(tmp_path / "policy.json")
    again, told, _ = command("simulate", small, "--policy", tmp_path / "policy.json", "--json")

    assert code == again == 0
    assert "Chosen: " in out
    assert "Why" in out
    assert "Next: expertflow-trace deploy" in err
    assert json.loads(told)["policy_hash"] == policy.behaviour_hash
    assert json.loads((tmp_path / "policy.tuning.json").read_text())["format"].startswith(
        "expertflow.tuning/"
    )


def test_tune_calls_nothing_chosen_that_meets_no_goal(command, small, tmp_path):
    code, out, err = command(
        "tune", small, "--min-tokens-per-s", "1e12", "--out", tmp_path / "policy.json"
    )

    assert code == 1
    assert "Chosen" not in out
    assert out.startswith("Not enough, the fastest tried: ")
    assert "No policy was written" in err
    assert not (tmp_path / "policy.json").exists()


def test_tune_prints_one_json_document(command, small, tmp_path):
    code, out, _ = command("tune", small, "--out", tmp_path / "policy.json", "--json")

    assert code == 0
    assert json.loads(out).keys() >= ALWAYS


def test_list_names_every_member_and_says_which_are_bounds(command):
    code, out, _ = command("list", "--json")
    _, text, _ = command("list")

    families = json.loads(out)["families"]
    assert code == 0
    assert {kind: [m["name"] for m in members] for kind, members in families.items()} == {
        family.kind: family.names() for family in FAMILIES
    }
    bounds = [m["name"] for members in families.values() for m in members if m["is_bound"]]
    assert set(bounds) >= {"belady", "belady_forced", "oracle"}
    assert not {"lru", "gate_lookahead", "equal", "fcfs", "load"} & set(bounds)
    assert "a bound, simulator only" in text


def test_list_says_what_each_member_takes_and_where_it_runs(command):
    _, out, _ = command("list", "--json")
    _, text, _ = command("list")

    document = json.loads(out)
    members = {kind: {m["name"]: m for m in rows} for kind, rows in document["families"].items()}
    assert members["cache"]["slru"]["params"] == [
        {"name": "protected", "default": 0.8, "is_required": False}
    ]
    assert members["cache"]["static"]["params"] == []  # what a trace teaches, nobody types
    assert members["misses"]["sooner"]["params"] == []
    defaults = {kind: [m for m in rows if rows[m]["is_default"]] for kind, rows in members.items()}
    assert defaults == {kind: [name] for kind, name in DEFAULTS.items()}
    assert all(member["is_deployable"] for member in members["misses"].values())
    assert not members["cache"]["belady"]["is_deployable"]
    assert (document["default_scope"], document["scopes"]["layer"]) == ("layer", "equal")
    assert "lru *" in text
    assert "unless you ask for --scope global" in text
    assert "protected=0.8" in text


def test_list_names_declared_hardware_with_its_sources(command):
    _, out, _ = command("list", "--json")
    _, text, _ = command("list")

    hardware = json.loads(out)["hardware"]
    assert {link["name"] for link in hardware["links"]} == set(LINKS)
    assert {gpu["name"] for gpu in hardware["gpus"]} == set(GPUS)
    for entry in (*hardware["links"], *hardware["gpus"]):
        assert entry["source"] in text
    assert "not measured" in text


def test_list_tells_which_engine_runs_a_member(command):
    pytest.importorskip("numba")
    _, out, _ = command("list", "--json")

    document = json.loads(out)
    slow = {
        m["name"]
        for members in document["families"].values()
        for m in members
        if m["engine"] == "reference"
    }
    assert document["has_compiled_engine"]
    assert slow == {"adaptive", "adaptive_forest"}  # they listen to how events went


def test_list_works_without_numba():
    code = "import sys; sys.modules['numba'] = None\n"
    code += "from expertflow.tracer.main import main; main(['list', '--json'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert not document["has_compiled_engine"]
    assert {m["engine"] for m in document["families"]["cache"]} == {"reference"}


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--cache", "lur", f"Unknown cache 'lur'. Known: {', '.join(caches.names())}"),
        ("--cache", "lruu", "Did you mean 'lru'?"),
        ("--predictor", "orcale", "Did you mean 'oracle'?"),
        ("--allocation", "equl", "Did you mean 'equal'?"),
        ("--scheduler", "fcsf", "Did you mean 'fcfs'?"),
        ("--budget", "nonsense", "128slots"),
        ("--budget", "0", "a share lies above 0"),
        ("--link", "fast", "for example 25GB/s+10us"),
    ],
)
def test_wrong_values_exit_two_with_what_is_allowed(command, small, option, name, words):
    code, out, err = command("simulate", small, option, name, "--json")

    assert code == 2
    assert words in err
    assert out == ""


def test_predictor_without_look_ahead_ids_exits_two_with_the_next_step(command, tmp_path):
    plain = synthetic_trace(tmp_path / "t", lookahead=0, new_tokens=2).path

    code, out, err = command("simulate", plain, "--predictor", "gate_lookahead", "--json")

    assert code == 2
    assert "Trace again with --lookahead 1" in err
    assert out == ""


@pytest.mark.parametrize("name", ["simulate", "tune"])
def test_damaged_and_missing_traces_exit_three(command, small, tmp_path, name):
    more = ("--out", tmp_path / "policy.json") if name == "tune" else ()
    damaged = shutil.copytree(small, tmp_path / "damaged")
    part = next((damaged / "routing").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-7] + b"changed")

    for folder in (damaged, tmp_path / "none"):
        code, out, err = command(name, folder, *more, "--json")

        assert code == 3
        assert str(folder) in err
        assert out == ""
    assert not (tmp_path / "policy.json").exists()


def test_foreign_policies_exit_three(command, small, tmp_path):
    (tmp_path / "policy.json").write_text("{}")

    code, _, err = command("simulate", small, "--policy", tmp_path / "policy.json")

    assert code == 3
    assert "is not a policy file" in err


def test_a_policy_of_another_model_exits_three(command, small, tmp_path):
    other = synthetic_trace(tmp_path / "other", new_tokens=2, layers=3, experts=8).path
    command("tune", other, "--out", tmp_path / "policy.json")

    code, out, err = command("simulate", small, "--policy", tmp_path / "policy.json", "--json")

    assert code == 3
    assert "synthetic-3x8-top2" in err
    assert out == ""


def test_stdout_of_a_real_process_holds_only_json(small, tmp_path):
    kept = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    line = [sys.executable, "-m", "expertflow.tracer", "tune", str(small)]

    done = subprocess.run(
        [*line, "--out", str(tmp_path / "policy.json"), "--json"],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )

    assert done.returncode == 0
    assert json.loads(done.stdout)["policy_hash"] != make_spec(slots=1).behaviour_hash()
    assert "tuning" in done.stderr
