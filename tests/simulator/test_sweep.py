"""Sweeps: every point once, kept on disk as it comes, continued after any end, and summed up honestly."""

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from expertflow.simulator import executors
from expertflow.simulator.executors import (
    ProcessExecutor,
    RayExecutor,
    SerialExecutor,
    make_executor,
)
from expertflow.simulator.feasible import builtin_space
from expertflow.simulator.forecast import Forecaster, forecaster
from expertflow.simulator.judge import Judge, Opening, judge_of
from expertflow.simulator.policy.spec import make_spec
from expertflow.simulator.search import search
from expertflow.simulator.space import (
    Budget,
    Option,
    Point,
    Range,
    Space,
    bound_points,
    grid,
    rival_points,
)
from expertflow.simulator.space_file import Search
from expertflow.simulator.split import split_by_batch
from expertflow.simulator.sweep import document_of, plan_of, summed_up, sweep
from expertflow.simulator.sweep_folder import PARTS, RESULTS, SweepFolder, read_sweep
from expertflow.simulator.sweep_report import front_lines
from expertflow.simulator.sweep_row import SCHEMA, Row, rows_of, table_of
from expertflow.tracer.errors import ResourceError, UsageError
from expertflow.tracer.main import main
from expertflow.tracer.quantities import LinkSpec
from expertflow.tracer.synthetic import synthetic_trace

SMALL = """
[space]
budgets = [0.25, 0.5]
caches = ["lru", "static", {name = "slru", protected = [0.5, 0.8]}]
allocations = ["equal"]
predictors = ["none", "gate_lookahead"]
"""
POINTS, BOUNDS = 2 * 4 * 2, 2 * 5


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return synthetic_trace(
        tmp_path_factory.mktemp("sweep") / "t",
        sequences=4,
        new_tokens=4,
        prompt_tokens=4,
        layers=2,
    ).path


@pytest.fixture
def command(capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(stop.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture
def toml(tmp_path) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def run(command, small, toml, tmp_path):
    """`sweep` of the small space in this process."""

    def start(*args: object, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        return command("sweep", small, "--out", out, "--space", toml, "--executor", "serial", *args)

    return start


@pytest.fixture(scope="module")
def judge(trace) -> Judge:
    # Without the policies' own time, which is measured anew on each run.
    return judge_of(replace(forecaster(trace), decision_is_measured=True))


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(
        budgets=(Budget("0.25", 16), Budget("0.5", 32)),
        members={
            "cache": (Option("lru"), Option("static"), Option("slru", {"protected": (0.5, 0.8)})),
            "allocation": (Option("equal"),),
            "predictor": (Option("none"), Option("gate_lookahead", {"depth": (1,)})),
            "scheduler": (Option("fcfs"),),
            "misses": (Option("load"),),
            "routing": (Option("as_routed"),),
        },
    )


def rows_in(folder: Path) -> list[Row]:
    return rows_of(pq.read_table(folder / RESULTS))


def told(rows) -> dict[str, Row]:
    """Rows by key, without what differs between two runs of the same."""
    return {row.key: replace(row, seconds=0.0) for row in rows}


class Counting(SerialExecutor):
    """Counts what it predicts; after `limit` points the user presses Ctrl-C."""

    def __init__(self, judge, limit=10**9):
        super().__init__(judge)
        self.count, self.limit = 0, limit

    def run(self, points):
        for row in super().run(points):
            if self.count == self.limit:
                raise KeyboardInterrupt
            self.count += 1
            yield row


@pytest.fixture
def counting(monkeypatch):
    """Lets `sweep` use an executor that counts; returns a function that sets its limit."""
    made: list[Counting] = []

    def prepare(limit=10**9):
        def make(name, judge, **_):
            made.append(Counting(judge, limit))
            return made[-1]

        monkeypatch.setattr(executors, "make_executor", make)
        return made

    return prepare


# --- what comes out ----------------------------------------------------------------------------


def test_a_sweep_leaves_one_row_per_configuration_and_a_summary(run, tmp_path):
    code, out, err = run()

    document = read_sweep(tmp_path / "out" / "sweep.json")
    rows = rows_in(tmp_path / "out")
    assert code == 0
    assert len(rows) == len({row.key for row in rows}) == POINTS + BOUNDS
    assert not any(row.error for row in rows)
    assert sum(row.is_bound for row in rows) == document.counts["bounds"] == BOUNDS
    assert document.status == "finished"
    assert document.counts["planned"] == document.counts["predicted"] == len(rows)
    assert {group.budget for group in document.best} == {"0.25", "0.5"}
    assert "Pareto front (tokens_per_s, peak_device_bytes)" in out
    assert "0.25 (8 slots)" in out
    assert "Synthetic" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [RESULTS, "sweep.json"]


def test_json_holds_the_summary_and_the_rows(run):
    code, out, _ = run("--json")

    document = json.loads(out)
    assert code == 0
    assert document["format"] == "expertflow.sweep/1"
    assert len(document["rows"]) == POINTS + BOUNDS
    assert {row["key"] for row in document["rows"]} >= set(document["pareto"])
    assert document["rows"][0].keys() == {field.name for field in fields(Row)}


def test_without_a_file_all_that_fits_the_trace_is_tried(command, small, tmp_path):
    code, out, _ = command(
        "sweep", small, "--out", tmp_path / "o", "--budget", "8slots", "--executor", "serial", "--json"
    )  # fmt: skip

    ready = forecaster_of(small)
    space = builtin_space(ready.workload, ready.costs, [Budget("8slots", 8)])
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row for row in rows if row["error"]] == []
    beside = [*rival_points(space), *bound_points(space)]
    assert len(rows) == space.size() + len(beside)
    assert {row["budget"] for row in rows} == {"8slots"}


def test_points_are_judged_on_batches_they_did_not_learn_from(judge, trace, space):
    learn, judged = split_by_batch(forecaster(trace).workload)
    point = next(p for p in grid(space) if p.members["cache"].name == "static")
    spec = make_spec(slots=16, cache="static", popularity=learn.popularity())

    row = judge.predict(point)
    result = replace(judge.forecaster, workload=judged).predict(spec, with_bounds=False)

    assert judge.is_held_out
    assert row.policy_hash == spec.behaviour_hash() == result.policy_hash
    assert row.tokens_per_s == result.tokens_per_s
    assert row.ttft_p95_s == result.ttft.p95
    assert row.decode_hit_rate == result.decode.hit_rate
    assert row.peak_device_bytes == result.peak_device_bytes


def test_parameters_reach_the_policy_and_the_row(judge, space):
    points = [p for p in grid(space) if p.members["cache"].name == "slru" and p.slots == 16]

    specs = [judge.spec(point) for point in points]
    row = judge.predict(points[0])

    assert {spec.cache.params["protected"] for spec in specs} == {0.5, 0.8}
    assert json.loads(row.params)["cache"] == {"protected": 0.5}
    assert row.point == points[0]


def test_rows_survive_parquet(judge, space):
    point = grid(space)[0]
    rows = [judge.predict(point), judge.predict(replace(point, slots=0))]

    assert rows[1].error
    assert rows_of(table_of(rows)) == rows
    assert table_of(rows).schema == SCHEMA


def test_bounds_are_neither_chosen_nor_on_the_front(run, tmp_path):
    run()

    document = read_sweep(tmp_path / "out" / "sweep.json")
    rows = {row.key: row for row in rows_in(tmp_path / "out")}
    assert document.pareto
    assert not any(rows[key].is_bound for key in document.pareto)
    for group in document.best:
        assert not rows[group.best].is_bound
        assert rows[group.bound].is_bound
        rivals = [r for r in rows.values() if r.slots == group.slots and not r.is_bound]
        assert rows[group.best].tokens_per_s == max(row.tokens_per_s for row in rivals)


def test_several_links_are_an_axis(command, small, tmp_path, toml):
    code, out, _ = command(
        "sweep", small, "--out", tmp_path / "o", "--space", toml, "--executor", "serial",
        "--link", "pcie4x16", "--link", "1GB/s+10us",
    )  # fmt: skip
    rows = rows_in(tmp_path / "o")

    by_link = {link: [r for r in rows if r.link == link] for link in ("pcie4x16", "1GB/s+10us")}
    assert code == 0
    assert len(rows) == 2 * (POINTS + BOUNDS)
    assert {row.link_origin for row in rows} == {"declared"}
    assert all(
        fast.stall_s < slow.stall_s
        for fast, slow in zip(by_link["pcie4x16"], by_link["1GB/s+10us"], strict=True)
    )
    assert "link pcie4x16" in out


def test_a_link_of_a_point_is_the_link_of_a_forecaster(judge, trace, space):
    point = replace(grid(space)[0], link="2GB/s+5us")
    whole = forecaster(trace, link=LinkSpec.parse("2GB/s+5us"))
    alone = replace(whole, workload=judge.forecaster.workload, decision_is_measured=True)

    row = judge.predict(point)

    result = alone.predict(judge.spec(point), with_bounds=False)
    assert (row.tokens_per_s, row.link) == (result.tokens_per_s, result.link)


def test_a_declared_gpu_replaces_the_machine(run, tmp_path):
    code, _, err = run("--gpu", "h100-sxm")

    document = read_sweep(tmp_path / "out" / "sweep.json")
    assert code == 0
    assert document.machine.links == ("pcie4x16",)
    assert "h100" in document.machine.device.lower()
    assert "pcie4x16, declared" in err


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_point_that_fails_is_a_row_and_tried_again_next_time(run, tmp_path, monkeypatch):
    healthy = Forecaster.predict

    def sick(self, spec, **options):
        if spec.cache.name == "lru":
            raise RuntimeError("out of luck")
        return healthy(self, spec, **options)

    monkeypatch.setattr(Forecaster, "predict", sick)
    code, _, err = run()
    failed = [row for row in rows_in(tmp_path / "out") if row.error]
    monkeypatch.setattr(Forecaster, "predict", healthy)
    again, _, _ = run()

    assert code == 0
    assert {row.error for row in failed} == {"RuntimeError: out of luck"}
    assert {row.cache for row in failed} == {"lru"}
    assert f"{len(failed)} of {POINTS + BOUNDS} points failed" in err
    assert again == 0
    assert not any(row.error for row in rows_in(tmp_path / "out"))


def test_a_sweep_of_failures_only_is_a_failure(run, tmp_path, monkeypatch):
    def sick(self, spec, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Forecaster, "predict", sick)

    code, _, err = run()

    assert code == 1
    assert "out of luck" in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--budget", "1.5"), 2, ("'1.5'", "128slots")),
        (("--link", "pcie4x61"), 2, ("'pcie4x61'", "'pcie4x16'?")),
        (("--executor", "rai"), 2, ("'rai'", "process, ray, serial", "'ray'?")),
        (("--gpu", "h100-sx"), 2, ("'h100-sx'", "'h100-sxm'?")),
        (("--gpu", "h100-sxm", "--machine", "m.json"), 2, ("--machine", "--gpu")),
        (("--expert-table", "t.parquet"), 2, ("--expert-table", "--gpu")),
        (("--machine", "nowhere.json"), 3, ("nowhere.json",)),
        (("--space", "nowhere.toml"), 3, ("nowhere.toml",)),
        (("--workers", "0"), 2, ("--workers",)),
        (("--trials", "0"), 2, ("--trials",)),
    ],
)
def test_a_wrong_option_says_what_is_allowed(command, small, tmp_path, options, code, words):
    got, _, err = command("sweep", small, "--out", tmp_path / "o", *options)

    assert got == code
    for word in words:
        assert word in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("caches = ['lruu']", ("'lruu'", "'lru'?")),
        ("caches = [{name = 'slru', protected = 2.0}]", ("slru", "2.0")),
        ("caches = [{name = 'slru', protected = {low = 0.1, high = 2.0}}]", ("slru", "2.0")),
        ("predictors = [{name = 'gate_lookahead', depth = [1, 2]}]", ("--lookahead 2",)),
        ("misses = ['cpu']", ("cpu", "CPU times")),
    ],
)
def test_a_space_that_cannot_be_tried_is_refused_before_it_begins(run, toml, tmp_path, text, words):
    toml.write_text(f"[space]\n{text}\n")

    code, _, err = run()

    assert code == 3
    assert "space.toml" in err
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


# --- resuming ----------------------------------------------------------------------------------


def test_the_same_command_again_predicts_nothing_anew(run, tmp_path, counting):
    run()
    before = rows_in(tmp_path / "out")
    made = counting()

    code, _, err = run()

    assert code == 0
    assert made[0].count == 0
    assert rows_in(tmp_path / "out") == before
    assert f"holds {len(before)} points already" in err


def test_rows_of_earlier_budgets_stay_and_are_counted(run, tmp_path):
    run("--budget", "0.25")
    before = {row.key for row in rows_in(tmp_path / "out")}

    code, _, err = run("--budget", "0.5")
    after = {row.key for row in rows_in(tmp_path / "out")}

    assert code == 0
    assert before < after
    assert f"({len(after)} rows, {len(before)} of earlier sweeps)" in err


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(run, tmp_path, counting):
    counting(limit=7)
    code, _, err = run()
    document = read_sweep(tmp_path / "out" / "sweep.json")
    made = counting()
    again, _, _ = run()

    assert code == 130
    assert "7 finished points are kept" in err
    assert "same command again" in err
    assert (document.status, document.counts["predicted"]) == ("interrupted", 7)
    assert again == 0
    assert made[-1].count == POINTS + BOUNDS - 7
    assert len(rows_in(tmp_path / "out")) == POINTS + BOUNDS


def test_a_kill_costs_the_rows_that_were_not_on_disk_and_no_other(judge, space, tmp_path):
    plan = plan_of(space, Search())
    document = document_of(judge, plan)
    rows = [judge.predict(point) for point in plan.points]
    killed = SweepFolder(tmp_path / "o")
    killed.open(document, fresh=False)
    for row in rows[:-3]:
        killed.add(row)
    killed.flush()
    parts = sorted((tmp_path / "o" / PARTS).iterdir())
    lost = len(pq.read_table(parts[-1]))
    parts[-1].unlink()
    (tmp_path / "o" / PARTS / "part-00009.parquet.partial").write_bytes(b"half a p")

    folder = SweepFolder(tmp_path / "o")
    folder.open(document, fresh=False)
    executor = Counting(judge)
    keys = sweep(judge, plan, folder, executor, advance=lambda _: None)
    folder.finish(document, keys)

    assert len(parts) > 1
    assert executor.count == lost + 3
    assert told(rows_in(tmp_path / "o")) == told(rows)
    assert [row.key for row in rows_in(tmp_path / "o")] == [p.key for p in plan.points]
    assert not (tmp_path / "o" / PARTS).exists()


def test_a_damaged_part_is_predicted_again(run, tmp_path, counting):
    run()
    (tmp_path / "out" / RESULTS).write_bytes(b"PAR1 no more")

    code, _, err = run()

    assert code == 0
    assert "cannot be read" in err
    assert len(rows_in(tmp_path / "out")) == POINTS + BOUNDS


def test_rows_reach_the_disk_by_number_and_by_time(judge, space, tmp_path):
    now = [0.0]
    folder = SweepFolder(tmp_path / "o", clock=lambda: now[0])
    folder.open(document_of(judge, plan_of(space, Search())), fresh=False)
    row = judge.predict(grid(space)[0])
    parts = tmp_path / "o" / PARTS

    folder.add(row)
    assert not list(parts.iterdir())
    now[0] = 11.0
    folder.add(replace(row, key="b"))
    assert len(list(parts.iterdir())) == 1
    for number in range(20):
        folder.add(replace(row, key=str(number)))
    assert len(list(parts.iterdir())) == 2


@pytest.fixture
def other(tmp_path) -> Path:
    return synthetic_trace(
        tmp_path / "other", sequences=4, new_tokens=4, prompt_tokens=4, layers=2, seed=1
    ).path


def test_a_folder_of_another_trace_is_refused_unless_fresh(run, command, other, toml, tmp_path):
    run()
    again = (
        "sweep", other, "--out", tmp_path / "out", "--space", toml, "--executor", "serial",
    )  # fmt: skip

    code, _, err = command(*again)
    kept = rows_in(tmp_path / "out")
    fresh, _, _ = command(*again, "--fresh")

    assert code == 2
    for words in ("another trace", "--fresh", "another --out"):
        assert words in err
    assert fresh == 0
    assert {r.key for r in rows_in(tmp_path / "out")} == {r.key for r in kept}
    assert told(rows_in(tmp_path / "out")) != told(kept)


def test_a_folder_of_another_machine_is_refused(run):
    run()

    code, _, err = run("--gpu", "h100-sxm")

    assert code == 2
    assert "another machine" in err


def test_another_link_or_space_on_the_same_machine_adds_to_the_folder(
    run, toml, tmp_path, counting
):
    run()
    toml.write_text(SMALL.replace('"lru"', '"lru", "lfu"'))
    made = counting()

    code, _, _ = run()

    assert code == 0
    assert made[0].count == 2 * 2
    assert len(rows_in(tmp_path / "out")) == POINTS + BOUNDS + 4


@pytest.mark.parametrize("option", ["--fresh", "--resume"])
def test_a_folder_of_something_else_is_left_alone(run, tmp_path, option):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")

    code, _, err = run(option)

    assert code == 2
    assert "not the folder of a sweep" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --- where points are predicted ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_give_the_rows_of_a_serial_run(judge, space, method):
    points = grid(space)

    with ProcessExecutor(judge, 2, method=method) as pool:
        rows = list(pool.run(points))

    assert len(rows) == len(points)
    assert told(rows) == told(map(judge.predict, points))


def test_spawned_processes_open_the_trace_themselves(small, space):
    opening = Opening(trace=small)
    judge = opening.judge()
    points = grid(space)[:4]

    with ProcessExecutor(judge, 1, opening, method="spawn") as pool:
        rows = list(pool.run(points))

    serial = {row.key: row for row in map(judge.predict, points)}
    assert {row.key: row.decode_hit_rate for row in rows} == {
        key: row.decode_hit_rate for key, row in serial.items()
    }


class Doomed:
    """A judge that the system ends."""

    def predict(self, point):
        os._exit(9)


def test_a_worker_that_is_killed_is_said_to_be(space):
    pool = ProcessExecutor(Doomed(), 2, method="fork")  # type: ignore[arg-type]

    with pool, pytest.raises(ResourceError, match="--workers"):
        list(pool.run(grid(space)))


def soon(happens: Callable[[], bool]) -> bool:
    until = time.monotonic() + 30
    while not happens() and time.monotonic() < until:
        time.sleep(0.01)
    return happens()


def test_leaving_a_pool_ends_its_workers(judge, space):
    with ProcessExecutor(judge, 2) as pool:
        next(iter(pool.run(grid(space))))
        workers = list(pool.workers())

    assert len(workers) == 2
    # Not `join`: the pool's own thread may have asked for the exit code first, and not have noted it yet.
    assert soon(lambda: not any(worker.is_alive() for worker in workers))


@dataclass
class Slow:
    """A judge that takes an hour for every point but one."""

    quick: Point

    def predict(self, point):
        time.sleep(0 if point == self.quick else 3600)


def test_busy_workers_end_though_the_parent_has_a_handler_of_its_own_for_sigterm(space):
    usual = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        points = grid(space)
        with ProcessExecutor(Slow(points[0]), 2, method="fork") as pool:  # type: ignore[arg-type]
            next(iter(pool.run(points)))
            workers = list(pool.workers())
        assert soon(lambda: not any(worker.is_alive() for worker in workers))
    finally:
        signal.signal(signal.SIGTERM, usual)
        for worker in workers:
            worker.kill()


def listening() -> set[str]:
    """Addresses, as Linux writes them, on which the processes begun by this one listen."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[stat.parent] = int(stat.read_text().rpartition(")")[2].split()[1])
    ours = {os.getpid()}
    while more := {int(p.name) for p, parent in parents.items() if parent in ours} - ours:
        ours |= more
    sockets = set()
    for number in ours:
        with suppress(OSError):
            sockets |= {os.readlink(fd) for fd in Path(f"/proc/{number}/fd").iterdir()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    is_open = "0A"
    return {f[1] for f in lines if f[3] == is_open and f"socket:[{f[9]}]" in sockets}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads what listens from /proc")
def test_ray_gives_the_rows_of_a_serial_run_and_listens_to_this_machine_only(
    judge, space, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / ".typing"))
    points = grid(space)[:4]
    before = listening()

    with RayExecutor(judge, 1) as cluster:
        rows = list(cluster.run(points))
        opened = listening() - before

    assert opened
    assert all(
        address.partition(":")[0].endswith("0100007F") for address in opened
    )  # 127.0.0.1, little-endian
    assert told(rows) == told(map(judge.predict, points))


@pytest.mark.parametrize(("name", "extra"), [("ray", "ray"), ("optuna", "sweep")])
def test_a_missing_library_names_its_extra(run, toml, monkeypatch, name, extra, small, command):
    monkeypatch.setitem(sys.modules, name, None)
    toml.write_text("[search]\nmethod = 'optuna'\ntrials = 2\n" if name == "optuna" else SMALL)
    options = () if name == "optuna" else ("--executor", "ray")

    code, _, err = run(*options)

    assert code == 4
    assert f"expertflow-trace[{extra}]" in err


def test_an_unknown_executor_is_refused(judge):
    with pytest.raises(UsageError, match="serial"):
        make_executor("seriel", judge)


# --- searching ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(space) -> Space:
    pytest.importorskip("optuna")
    slru = Option("slru", {"protected": Range(0.1, 0.9)})
    return replace(
        space,
        budgets=Range(8, 40),
        members={**space.members, "cache": (Option("lru"), slru)},
    )


class Memory:
    """Answers a search from what it knows, and asks the judge for the rest."""

    def __init__(self, judge, rows=()):
        self.judge = judge
        self.rows = {row.key: row for row in rows}
        self.predicted: list[str] = []

    def __call__(self, points):
        for point in points:
            if point.key not in self.rows:
                self.rows[point.key] = self.judge.predict(point)
                self.predicted.append(point.key)
        return [self.rows[point.key] for point in points]


@pytest.mark.parametrize("objectives", [("tokens_per_s", "peak_device_bytes"), ("tokens_per_s",)])
def test_a_search_tries_as_many_points_as_told_and_the_same_for_a_seed(judge, endless, objectives):
    def keys(seed):
        memory = Memory(judge)
        found = search(endless, objectives, trials=25, seed=seed, evaluate=memory)
        assert sorted(found) == sorted(memory.predicted)
        return found

    first = keys(0)
    assert len(set(first)) == 25
    assert keys(0) == first
    assert keys(1) != first


def test_a_search_stays_inside_its_space(judge, endless):
    memory = Memory(judge)

    search(endless, ("tokens_per_s",), trials=25, seed=0, evaluate=memory)

    for row in memory.rows.values():
        assert 8 <= row.slots <= 40
        params = json.loads(row.params).get("cache", {})
        assert (row.cache == "slru") == ("protected" in params)
        assert 0.1 <= params.get("protected", 0.5) <= 0.9


def test_a_search_with_one_aim_finds_better_than_its_first_points(judge, endless):
    memory = Memory(judge)

    keys = search(endless, ("tokens_per_s",), trials=40, seed=0, evaluate=memory)

    speeds = [memory.rows[key].tokens_per_s for key in keys]
    assert max(speeds[10:]) > max(speeds[:10])


def test_a_search_that_was_cut_short_goes_on_where_it_was(judge, endless):
    aims = ("tokens_per_s", "peak_device_bytes")
    whole, short = Memory(judge), Memory(judge)
    keys = search(endless, aims, trials=60, seed=0, evaluate=whole)
    search(endless, aims, trials=45, seed=0, evaluate=short)
    again = Memory(judge, short.rows.values())

    assert search(endless, aims, trials=60, seed=0, evaluate=again) == keys
    assert len(again.predicted) == 60 - 45


def test_a_search_is_told_what_other_searches_found(judge, endless):
    aims = ("tokens_per_s",)
    first = Memory(judge)
    search(endless, aims, trials=12, seed=0, evaluate=first)
    outside = judge.predict(replace(next(iter(first.rows.values())).point, slots=60))
    known = [*first.rows.values(), outside]
    second = Memory(judge, known)

    keys = search(endless, aims, trials=5, seed=1, evaluate=second, known=known)

    assert len(second.predicted) == 5
    assert set(keys) == first.rows.keys() | set(second.predicted)
    assert outside.key not in keys


def test_a_search_of_a_small_space_ends_when_there_is_nothing_new(judge, space):
    pytest.importorskip("optuna")
    memory = Memory(judge)

    keys = search(space, ("tokens_per_s",), trials=500, seed=0, evaluate=memory)

    assert 0 < len(keys) <= space.size()


def test_failed_points_do_not_stop_a_search(judge, endless):
    def evaluate(points):
        rows = [judge.predict(point) for point in points]
        return [
            replace(row, tokens_per_s=None, error="out of luck") if row.cache == "lru" else row
            for row in rows
        ]

    assert len(search(endless, ("tokens_per_s",), trials=12, seed=0, evaluate=evaluate)) == 12


def test_a_search_by_command_reports_its_front(run, toml, tmp_path):
    pytest.importorskip("optuna")
    toml.write_text(
        "[space]\nbudgets = {low = 0.2, high = 0.8}\n"
        "caches = ['lru', {name = 'slru', protected = {low = 0.1, high = 0.9}}]\n"
        "allocations = ['equal']\n[search]\ntrials = 15\n"
    )

    code, out, _ = run()

    document = read_sweep(tmp_path / "out" / "sweep.json")
    assert code == 0
    assert document.search == {
        "method": "optuna", "trials": 15, "objectives": ["tokens_per_s", "peak_device_bytes"],
    }  # fmt: skip
    assert len(rows_in(tmp_path / "out")) == 15
    assert out.count("slots: ") == 1  # the best of all, not of each size


# --- summing up --------------------------------------------------------------------------------


def test_front_and_best_follow_the_objectives(judge, space):
    plan = plan_of(space, Search(objectives=("bytes_per_token", "slots")))
    rows = [judge.predict(point) for point in plan.points]

    document = summed_up(document_of(judge, plan), rows, status="finished")

    usable = {row.key: row for row in rows if not row.is_bound}
    least = min(row.bytes_per_token for row in usable.values())
    assert usable[document.pareto[0]].bytes_per_token == least
    assert {usable[key].slots for key in document.pareto} == {16, 32}
    for group in document.best:
        rivals = [row for row in usable.values() if row.slots == group.slots]
        assert usable[group.best].bytes_per_token == min(row.bytes_per_token for row in rivals)


def test_of_equals_the_simpler_is_chosen_and_shown(judge, space):
    plan = plan_of(replace(space, bounds=False), Search())
    row = judge.predict(plan.points[0])
    plain = replace(row, key="p", cache="lru", label="plain")
    elaborate = replace(row, key="e", cache="arc", label="elaborate")

    document = summed_up(document_of(judge, plan), [elaborate, plain], status="finished")
    lines = front_lines(document, {"p": plain, "e": elaborate})

    assert document.pareto == ("p", "e")
    assert [group.best for group in document.best] == ["p"]
    assert [name for name, _ in lines] == ["plain"]
    assert "as good: 1 more" in lines[0][1]


def test_one_batch_for_learning_and_judging_is_said(tmp_path, space):
    one = synthetic_trace(tmp_path / "t", sequences=2, batch_size=2, new_tokens=4)
    judge = judge_of(forecaster(one))

    warnings = document_of(judge, plan_of(space, Search())).warnings

    assert not judge.is_held_out
    assert any("one batch" in warning for warning in warnings)


def forecaster_of(path: Path) -> Forecaster:
    return Opening(trace=path).forecaster()
