"""Whatever is typed wrong: exit 2 or 3, what is allowed, the nearest name, and never a traceback."""

import json

import numpy as np
import pytest
from expertflow.simulator.arrivals import FORMS
from expertflow.simulator.hardware_profiles import GPUS, LINKS
from expertflow.simulator.policy.registry import FAMILIES, caches
from expertflow.simulator.sweep_row import OBJECTIVES
from expertflow.tracer.errors import nearest
from expertflow.tracer.main import main
from expertflow.tracer.synthetic import synthetic_trace

BUDGETS = "a share of all experts (0.5), a number of slots (128slots), or bytes (6GiB)"
LINK_NAMES = f"Known: {', '.join(sorted(LINKS))}"
GPU_NAMES = f"Known: {', '.join(sorted(GPUS))}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace `t`, one without weights and look-ahead `plain`, routing `r.npz`, and its import `theirs`."""
    place = tmp_path_factory.mktemp("wrong")
    small = {"sequences": 4, "new_tokens": 3, "prompt_tokens": 4, "layers": 2}
    synthetic_trace(place / "t", **small)
    synthetic_trace(place / "plain", lookahead=0, weights=False, **small)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((60, 4, 16)))[..., :2]
    np.savez(place / "r.npz", expert_ids=ids, seq_bounds=[0, 20, 60])
    (place / "text.txt").write_text("no data\n")
    (place / "foreign.json").write_text(json.dumps({"format": "expertflow.trace/1"}))
    with pytest.raises(SystemExit):
        main(["import", str(place / "r.npz"), "--out", str(place / "theirs")])
    return place


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run a command line that must be refused; returns its exit code and stderr in one line."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        streams = capsys.readouterr()
        assert streams.out == ""
        assert "Traceback" not in streams.err
        assert "This is a bug" not in streams.err
        # Typer draws boxes around its own.
        return int(stop.value.code or 0), " ".join(streams.err.replace("│", " ").split())

    return run


def says(refused, line: str, code: int, *words: str) -> None:
    """The command is refused with this code, and all the words."""
    got, error = refused(*line.split())

    assert got == code, error
    for word in words:
        assert word in error


# --- names and numbers that several commands take ------------------------------------------------

STARTS = {
    "simulate": "simulate t",
    "tune": "tune t --out out/policy.json",
    "sweep": "sweep t --out out/sweep --executor serial",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget x", ["Budget 'x'", BUDGETS]),
        ("--budget 2", ["a share lies above 0 and at most at 1", BUDGETS]),
        ("--budget 0slots", ["at least one slot", BUDGETS]),
        ("--budget 1B", ["one expert of this model takes", BUDGETS]),
        ("--budget -1", ["Budget '-1'", BUDGETS]),
        ("--budget nan", ["Budget 'nan'", BUDGETS]),
        ("--budget 1e999GiB", ["Budget '1e999GiB'", BUDGETS]),
        ("--link pcie4x32", [LINK_NAMES, "Did you mean 'pcie4x8'?", "25GB/s+10us"]),
        ("--link 25GB", [LINK_NAMES, "25GB/s+10us"]),
        ("--link 0GB/s", [LINK_NAMES, "25GB/s+10us"]),
        ("--link 1e999GB/s", [LINK_NAMES, "25GB/s+10us"]),
        ("--link 1e-300B/s", [LINK_NAMES, "25GB/s+10us"]),
        ("--link 1GB/s+1e300s", [LINK_NAMES, "25GB/s+10us"]),
        ("--gpu h100", [GPU_NAMES, "Did you mean 'h100-sxm'?"]),
        ("--gpu RTX409", [GPU_NAMES, "Did you mean 'rtx4090'?"]),
        ("--gpu t4 --machine m.json", ["--machine and --gpu both name a machine"]),
        ("--expert-table x.csv", ["name it with --gpu"]),
        ("--nonsense 1", ["No such option: --nonsense"]),
    ],
)
def test_wrong_values_exit_two(refused, start, options, words):
    says(refused, f"{start} {options}", 2, *words)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--machine none.json", ["none.json does not exist"]),
        ("--machine text.txt", ["not readable JSON"]),
        ("--machine foreign.json", ["not a machine file", "expertflow-trace calibrate"]),
        ("--gpu t4 --expert-table none.csv", ["none.csv cannot be read as a table", ".parquet"]),
        ("--gpu t4 --expert-table text.txt", ["text.txt has the columns", "tokens"]),
    ],
)
def test_wrong_files_exit_three(refused, start, options, words):
    says(refused, f"{start} {options}", 3, *words)


@pytest.mark.parametrize(
    "line",
    ["simulate {}", "tune {} --out out/p.json", "sweep {} --out out/s", "curve {}"],
    ids=lambda line: line.split()[0],
)
@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ("none", "none does not exist"),
        ("text.txt", "a trace is a folder"),
        (".", "so it is not a trace folder"),
    ],
)
def test_what_is_no_trace_exits_three(refused, line, trace, words):
    says(refused, line.format(trace), 3, words)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_routing_without_times_asks_for_a_machine(refused, start):
    says(refused, start.replace(" t", " theirs", 1), 2, "--gpu", "--link", "--machine")


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_routing_without_sizes_cannot_be_timed(refused, start):
    says(refused, start.replace(" t", " theirs", 1) + " --gpu t4", 2, "--expert-bytes")


# --- members -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
@pytest.mark.parametrize("change", [lambda name: name + "x", str.upper], ids=["longer", "upper"])
def test_every_family_names_what_there_is_and_the_nearest(refused, family, change):
    name = family.names()[0]
    wrong = change(name)

    says(
        refused,
        f"simulate t --{family.kind} {wrong}",
        2,
        f"Unknown {family.kind} {wrong!r}. Known: {', '.join(family.names())}.",
        f"Did you mean {name!r}?",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--scope layers", ["Known: global, layer.", "Did you mean 'layer'?"]),
        ("--scope global --allocation equal", ["--scope global means --allocation global"]),
        ("--misses cpu", ["declare it with --cpu-expert"]),
        ("--misses sooner --cpu-expert fast", ["for example 2ms+0.3ms"]),
        ("--cpu-expert -1ms", ["for example 2ms+0.3ms"]),
    ],
)
def test_wrong_policies_exit_two(refused, options, words):
    says(refused, f"simulate t {options}", 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--predictor gate_lookahead", "Trace again with --lookahead 1"),
        ("--cache score", "Trace again with --weights"),
    ],
)
def test_what_the_trace_lacks_is_named_with_the_next_step(refused, options, words):
    says(refused, f"simulate plain {options}", 2, words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.json", "none.json does not exist"),
        ("text.txt", "not readable JSON"),
        ("foreign.json", "is not a policy file"),
        ("t", "t is a folder, and a JSON file is expected"),
    ],
)
def test_wrong_policy_files_exit_three(refused, path, words):
    says(refused, f"simulate t --policy {path}", 3, words)


# --- arrivals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--arrivals poison:3", ["Known: closed, every, poisson.", "Did you mean 'poisson'?"]),
        ("--arrivals poisson", ["for example poisson:2.5"]),
        ("--arrivals poisson:0", ["requests/s above 0", "got '0'"]),
        ("--arrivals every:x", ["seconds above 0", "for example every:2.5"]),
        ("--arrivals closed:0", ["whole number of users", "for example closed:8"]),
        ("--arrivals often", [FORMS]),
        ("--max-batch 3", ["--max-batch is about requests that arrive; add --arrivals"]),
        ("--arrivals every:1 --max-batch 0", ["must be at least 1, got 0"]),
        ("--arrivals every:1 --requests 0", ["must be at least 1, got 0"]),
        ("--arrivals every:1 --arrival-speed 0", ["must be above 0", "2 is twice as fast"]),
        ("--arrivals every:1 --lengths trce", ["Known: arrivals, trace.", "Did you mean 'trace'?"]),
        ("--arrivals every:1 --lengths arrivals", ["say nothing about lengths"]),
        ("--arrivals every:1 --prefill fist", ["Known: first, mixed.", "Did you mean 'first'?"]),
        ("--arrivals poisson:1 --seed -1", ["--seed", "greater than or equal to 0"]),
        ("--arrivals every:1 --cache belady", ["closed:USERS"]),
        ("--arrivals every:1 --predictor oracle", ["closed:USERS"]),
    ],
)
def test_wrong_arrivals_exit_two(refused, options, words):
    says(refused, f"simulate t {options}", 2, *words)


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("none.csv", None, "none.csv cannot be read"),
        ("a.csv", "a,b\n1,2\n", "TIMESTAMP, ContextTokens, GeneratedTokens"),
        (
            "b.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n",
            "line 2: TIMESTAMP is 'now'",
        ),
        ("c.jsonl", "[1]\n", "line 1 is not a JSON object"),
        (
            "d.jsonl",
            '{"timestamp": 0, "input_length": 0, "output_length": 1}\n',
            "input_length is 0",
        ),
        ("e.csv.gz", "no gzip", "cannot be read"),
        ("f.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
    ],
)
def test_wrong_arrival_files_exit_three(refused, folder, name, body, words):
    if body is not None:
        (folder / name).write_text(body)

    says(refused, f"simulate t --arrivals {name}", 3, words)


# --- goals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", ["--min-tokens-per-s", "--max-ttft", "--max-tpot"])
@pytest.mark.parametrize(
    ("value", "words"),
    [("fast", "valid number"), ("-1", "greater than or equal to 0"), ("nan", "greater than")],
)
def test_wrong_goals_exit_two(refused, goal, value, words):
    says(refused, f"tune t --out out/policy.json {goal} {value}", 2, goal, words)


# --- spaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[space", ["not readable TOML"]),
        ("[spce]", ["allowed: space, search", "Did you mean 'space'?"]),
        ("space = 3", ["[space] is a table"]),
        ('[space]\ncache = ["lru"]', ["allowed: budgets, links", "Did you mean 'caches'?"]),
        ('[space]\ncaches = ["lur"]', ["[space] caches", *caches.names(), "Did you mean 'lru'?"]),
        ('[space]\ncaches = "lru"', ["expected a list"]),
        ("[space]\ncaches = []", ["the list is empty"]),
        ("[space]\ncaches = [3]", ['{name = "…", …}']),
        ('[space]\ncaches = [{nme = "slru"}]', ["has no name"]),
        (
            '[space]\ncaches = [{name = "slru", protectd = [0.5]}]',
            ["allowed: protected", "Did you mean 'protected'?"],
        ),
        ('[space]\ncaches = [{name = "slru", protected = [5]}]', ["0 <= protected <= 1, got 5"]),
        ('[space]\ncaches = [{name = "slru", protected = ["x"]}]', ["cannot take ['protected']"]),
        ('[space]\nallocations = ["equl"]', ["Did you mean 'equal'?"]),
        ('[space]\nschedulers = ["fcf"]', ["Did you mean 'fcfs'?"]),
        ('[space]\nmisses = ["lod"]', ["Did you mean 'load'?"]),
        ('[space]\nmisses = ["cpu"]', ["CPU times of an expert"]),
        (
            '[space]\npredictors = [{name = "gate_lookahead", depth = [3]}]',
            ["the trace recorded 1", "--lookahead 3"],
        ),
        ("[space]\nbudgets = [2]", [BUDGETS]),
        ('[space]\nbudgets = ["x"]', [BUDGETS]),
        ("[space]\nbudgets = [true]", ["expected text, got True"]),
        ("[space]\nbudgets = {low = 0.5}", ["both low and high"]),
        ("[space]\nbudgets = {low = 0.5, high = 0.1}", ["rises from low to high"]),
        ('[space]\nlinks = ["pcie9"]', [LINK_NAMES, "25GB/s+10us"]),
        ("[space]\nbounds = 1", ["true or false"]),
        ('[search]\nmethod = "gird"', ["allowed: auto, grid, optuna.", "Did you mean 'grid'?"]),
        ("[search]\ntrials = 0", ["at least 1, got 0"]),
        ('[search]\nobjectives = ["tokens"]', [*OBJECTIVES, "Did you mean 'tokens_per_s'?"]),
        ('[search]\nmethod = "grid"\n[space]\nbudgets = {low = 0.1, high = 0.9}\n'
         'caches = [{name = "slru", protected = {low = 0.1, high = 0.9}}]', ["continuous range"]),
    ],
)  # fmt: skip
def test_wrong_spaces_exit_three_with_the_file_and_the_key(refused, folder, toml, words):
    (folder / "space.toml").write_text(toml)

    says(
        refused, "sweep t --out out/s --executor serial --space space.toml", 3, "space.toml", *words
    )


@pytest.mark.parametrize("path", ["none.toml", "t"])
def test_spaces_that_are_no_files_exit_three(refused, path):
    says(refused, f"sweep t --out out/s --space {path}", 3, path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--executor proces", ["Known: process, ray, serial.", "Did you mean 'process'?"]),
        ("--workers 0", ["--workers", "greater than or equal to 1"]),
        ("--trials 0", ["--trials", "greater than or equal to 1"]),
        ("--seed -1", ["--seed", "greater than or equal to 0"]),
    ],
)
def test_wrong_ways_to_sweep_exit_two(refused, options, words):
    says(refused, f"sweep t --out out/s {options}", 2, *words)


# --- curve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--caches lru,lfuu", ["Known: arc", "Did you mean 'lfu'?"]),
        ("--caches ,", ["--caches names none", *caches.names()]),
        ("--scope glbal", ["Known: global, layer.", "Did you mean 'global'?"]),
        ("--caches lru,score", ["cache 'score' needs gate weights"]),
    ],
)
def test_wrong_curves_exit_two(refused, options, words):
    says(refused, f"curve plain {options}", 2, *words)


# --- import --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--phase decod", 2, ["Known: decode, prefill.", "Did you mean 'decode'?"]),
        ("--layout tokens", 2, ["Known: auto, layers-first, tokens-first.", "'tokens-first'?"]),
        ("--experts 0", 2, ["must be at least 1"]),
        ("--experts 4", 3, ["names expert 15", "Pass --experts 16"]),
        ("--expert-bytes x", 2, ["B, KB, MB, GB", "for example 6GiB"]),
        ("--expert-bytes 13", 2, ["B, KB, MB, GB"]),
        ("--non-expert-bytes -1", 2, ["B, KB, MB, GB"]),
        ("--hidden-size -1", 2, ["0 (unknown) or more"]),
        ("--limit-tokens 0", 2, ["must be at least 1"]),
        ("--domain topic", 2, ["Known: none."]),
    ],
)
def test_wrong_imports_are_refused(refused, folder, options, code, words):
    says(refused, f"import r.npz --out out/imported {options}", code, *words)
    assert not (folder / "out" / "imported").exists()


@pytest.mark.parametrize("path", ["none.npz", "text.txt", "t"])
def test_what_is_no_archive_exits_three(refused, path):
    says(refused, f"import {path} --out out/imported", 3, path)


# --- where to write ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "simulate t --out t",
        "curve t --out t",
        "tune t --out t",
        "sweep t --out text.txt",
        "sweep t --out t",
        "import r.npz --out text.txt",
        "import r.npz --out text.txt --overwrite",
    ],
)
def test_an_output_of_the_wrong_kind_is_refused_before_the_work(refused, folder, line):
    code, error = refused(*line.split())

    assert code == 2
    assert line.split("--out ")[1].split()[0] in error
    assert (folder / "text.txt").read_text() == "no data\n"


@pytest.mark.parametrize("option", ["--out", "--timeline", "--policy-out"])
def test_nothing_takes_the_place_of_a_trace(refused, folder, option):
    before = (folder / "t" / "manifest.json").read_bytes()

    says(
        refused, f"simulate t {option} t/manifest.json", 2, "holds expertflow.trace", "another name"
    )

    assert (folder / "t" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("option", ["--budget 0.25", "--cache lru", "--scope layer"])
def test_what_a_policy_file_says_is_not_asked_again(refused, option):
    says(
        refused,
        f"simulate t --policy p.json {option}",
        2,
        "--policy brings its own",
        option.split()[0],
    )


@pytest.mark.parametrize("line", ["simulate t --json", "curve t --json", "tune t --json"])
def test_an_output_inside_a_file_is_refused(folder, monkeypatch, capsys, line):
    monkeypatch.chdir(folder)

    with pytest.raises(SystemExit) as stop:
        main([*line.split(), "--out", "text.txt/result.json"])

    streams = capsys.readouterr()
    assert stop.value.code == 4
    assert "text.txt is not a folder" in streams.err
    assert streams.out == ""


def test_folders_for_outputs_are_made(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    with pytest.raises(SystemExit) as stop:
        main(["simulate", "t", "--out", "new/folder/result.json"])

    assert not stop.value.code
    assert json.loads((folder / "new" / "folder" / "result.json").read_text())["slots"] == 16


# --- the nearest name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "near"),
    [
        ("h100", "h100-sxm"),
        ("H200", "h200"),
        ("rtx409", "rtx4090"),
        ("rtx-40990", "rtx4090"),
        ("", ""),
        ("zzz", ""),
        ("a1", "a10"),
    ],
)
def test_nearest_begins_alike_or_is_close(got, near):
    assert nearest(got, sorted(GPUS)) == near
