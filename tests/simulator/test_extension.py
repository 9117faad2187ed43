"""The package on docs/add-a-policy.md, taken from the page, installed and used: what the page says is true."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from expertflow.simulator.policy.base import NEEDS, Signals
from expertflow.simulator.policy.registry import FAMILIES
from expertflow.tracer.synthetic import synthetic_trace

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-policy.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`[^\n]*\n\n```\w+\n(.*?)```", PAGE, re.M | re.S))
COMMANDS = re.findall(r"^expertflow-trace .+$", PAGE, re.M)

RECORDED = ("hit_rate", "bytes_per_token", "batch_size")


@dataclass(frozen=True)
class Workplace:
    """A folder with a trace, and the package installed for processes that run there."""

    path: Path
    site: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "EXPERTFLOW_DEBUG")}
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=self.path,
            env={**kept, "PYTHONPATH": os.pathsep.join([str(self.site), *filter(None, sys.path)])},
            timeout=300,
        )

    def command(self, line: str, *more: str) -> dict:
        """What a command line of the page prints as JSON."""
        done = self.python("-m", "expertflow.tracer", *shlex.split(line)[1:], *more, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    path = tmp_path_factory.mktemp("extension")
    site = path / "site"
    project = tomllib.loads(FILES["pyproject.toml"])
    info = site / f"my_policies-{project['project']['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-policies\nVersion: 0.1\n")
    lines: list[str] = []
    for group, names in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in names.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module in project["tool"]["setuptools"]["py-modules"]:
        (site / f"{module}.py").write_text(FILES[f"{module}.py"])
    for name in ("test_my_policies.py", "space.toml"):
        (path / name).write_text(FILES[name])
    synthetic_trace(
        path / "traces" / "mine", layers=3, sequences=6, prompt_tokens=12, new_tokens=6, experts=8
    )
    return Workplace(path, site)


def test_the_page_holds_the_whole_package():
    assert set(FILES) == {"pyproject.toml", "my_policies.py", "test_my_policies.py", "space.toml"}
    assert [line.split()[1] for line in COMMANDS] == ["list", "simulate", "simulate", "sweep"]
    groups = set(re.findall(r"expertflow\.(\w+)[\"`]", PAGE))
    assert {family.group for family in FAMILIES} <= {f"expertflow.{group}" for group in groups}


def test_the_table_of_needs_is_complete():
    table = PAGE.split("## What `needs` does")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]

    assert {need for row in rows for need in re.findall(r"`(\w+)`", row)} == set(NEEDS)
    signals = {field.name for field in fields(Signals)}
    assert set(re.findall(r"signals\.(\w+)", table)) == signals


def test_the_package_keeps_the_contract(workplace):
    done = workplace.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_policies.py")

    assert done.returncode == 0, done.stdout
    assert re.search(r"\d{2} passed", done.stdout)


def test_the_contract_fails_a_cache_that_forgets_protection(workplace):
    broken = FILES["my_policies.py"].replace("if key not in protected", "")
    assert broken != FILES["my_policies.py"]
    module = workplace.site / "my_policies.py"
    module.write_text(broken)
    try:
        done = workplace.python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_policies.py"
        )
    finally:
        module.write_text(FILES["my_policies.py"])

    assert done.returncode == 1, done.stdout


def test_list_shows_the_members_like_built_in_ones(workplace):
    found = workplace.command(COMMANDS[0])
    members = {kind: {m["name"]: m for m in rows} for kind, rows in found["families"].items()}

    cache, predictor = members["cache"]["second_chance"], members["predictor"]["follows"]
    assert (
        cache["doc"] == "A queue in which a demanded expert is spared once (CLOCK). O(n) per call."
    )
    assert (cache["needs"], cache["engine"], cache["is_deployable"]) == ([], "reference", True)
    assert predictor["needs"] == ["routing"]
    assert predictor["params"] == [{"name": "most", "default": 4, "is_required": False}]
    assert "shortest_first" in members["scheduler"]
    if found["has_compiled_engine"]:
        assert predictor["engine"] == members["scheduler"]["shortest_first"]["engine"] == "compiled"


def test_simulate_runs_the_cache_on_the_reference_engine(workplace):
    whole = workplace.command(COMMANDS[1])
    plain = workplace.command("expertflow-trace simulate traces/mine --predictor follows")

    assert whole["policy"]["cache"] == "second_chance"
    assert whole["policy"]["predictor"] == "follows"
    assert whole["prefetch"]["issued"] > 0
    assert whole["engine"] == "reference"
    assert plain["engine"] == _fast()


def test_a_scheduler_is_asked_where_requests_arrive_only(workplace):
    def ttft(line: str) -> dict:
        found = workplace.command(line, "--max-batch", "1")
        assert found["arrivals"]["requests"] == 6
        assert found["engine"] == _fast()
        return found["ttft"]

    busy = COMMANDS[2].replace("poisson:20", "every:0.000001")
    assert ttft(COMMANDS[2])
    # Whoever goes first, the waits differ, as prompts do.
    assert ttft(busy) != ttft(busy.replace("shortest_first", "fcfs"))
    recorded = "expertflow-trace simulate traces/mine"
    one, other = (
        workplace.command(f"{recorded} --scheduler {n}") for n in ("shortest_first", "fcfs")
    )
    assert [one[k] for k in RECORDED] == [other[k] for k in RECORDED]


def test_a_sweep_tries_it_beside_the_others_and_sets_its_parameters(workplace):
    document = workplace.command(COMMANDS[3], "--executor", "serial")
    rows = pq.read_table(workplace.path / "sweeps" / "mine" / "results.parquet").to_pylist()

    assert document["counts"]["failed"] == 0
    ours = [row for row in rows if row["cache"] == "second_chance"]
    assert len(ours) == 2 * 2 * 3
    assert {row["engine"] for row in ours} == {"reference"}
    assert {json.loads(row["params"]).get("predictor", {}).get("most") for row in ours} == {
        None,
        2,
        8,
    }


def test_without_a_space_file_it_is_tried_by_itself(workplace):
    code = (
        "from pathlib import Path\n"
        "from expertflow.simulator.feasible import builtin_space\n"
        "from expertflow.simulator.judge import Opening\n"
        "ready = Opening(trace=Path('traces/mine')).forecaster()\n"
        "space = builtin_space(ready.workload, ready.costs, [])\n"
        "groups = [*space.members.values(), space.rivals]\n"
        "print(*(option.name for options in groups for option in options))\n"
    )
    done = workplace.python("-c", code)

    assert done.returncode == 0, done.stderr
    assert {"second_chance", "follows", "lru", "gate_lookahead"} <= set(done.stdout.split())


def test_what_a_member_learned_travels_in_the_policy_file(workplace):
    code = (
        "from pathlib import Path\n"
        "from expertflow.simulator.policy.checked import tiny_shape\n"
        "from expertflow.simulator.policy.registry import caches\n"
        "from expertflow.simulator.policy.spec import PolicyFile, make_spec, read_policy, write_policy\n"
        "from my_policies import SecondChance\n"
        "class Learned(SecondChance):\n"
        "    'Knows a table.'\n"
        "    name = 'learned'\n"
        "    def __init__(self, table):\n"
        "        super().__init__()\n"
        "        self.table = table\n"
        "caches.register('learned', Learned)\n"
        "table = [[0.25, 0.5], [1, 2]]\n"
        "spec = make_spec(slots=4, cache='learned', cache_params={'table': table})\n"
        "other = make_spec(slots=4, cache='learned', cache_params={'table': [[0.25, 0.5], [1, 3]]})\n"
        "file = PolicyFile(behaviour=spec, behaviour_hash=spec.behaviour_hash(), shape=tiny_shape(),"
        " budget='4slots', trace='none')\n"
        "write_policy(Path('policy.json'), file)\n"
        "again = read_policy(Path('policy.json')).behaviour\n"
        "assert again.build(tiny_shape()).pools[0].cache.table == table\n"
        "assert spec.behaviour_hash() == again.behaviour_hash() != other.behaviour_hash()\n"
    )
    done = workplace.python("-c", code)

    assert done.returncode == 0, done.stderr


def test_a_name_that_is_close_leads_to_it(workplace):
    done = workplace.python(
        "-m", "expertflow.tracer", "simulate", "traces/mine", "--cache", "second_chanse"
    )

    assert done.returncode == 2
    assert "Did you mean 'second_chance'?" in done.stderr


def _fast() -> str:
    import importlib.util

    return "compiled" if importlib.util.find_spec("numba") else "reference"
