"""The shape of the tree: who may import whom, what stays pure, and where things are declared."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tracer", "simulator", "runtime", "dashboard")
FILES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.is_file()
)
POLICY = ROOT / "simulator" / "policy"
FAMILY_FOLDERS = ("allocations", "caches", "misses", "predictors", "routings", "schedulers")
MEMBERS = sorted(
    path
    for folder in FAMILY_FOLDERS
    for path in (POLICY / folder).glob("*.py")
    if path.name != "__init__.py"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

ARROWS = {
    "tracer": set(),
    "simulator": {"tracer"},
    "runtime": {"tracer", "simulator"},
    "dashboard": {"tracer", "simulator"},
}
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, wherever in it, relative ones resolved."""
    here = ("expertflow", *path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A package's __init__ is the package itself, so one level up is where its files are.
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(names: Iterator[str]) -> set[str]:
    """The packages of ours among the names."""
    found = (name.split(".") for name in names)
    return {parts[1] for parts in found if parts[0] == "expertflow" and len(parts) > 1}


def in_process(code: str) -> str:
    """Run code in a Python of its own, as from a checkout; returns its stdout."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(ROOT / ".typing")},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- arrows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]

    assert ours(imports_of(path)) <= ARROWS[package] | {package}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_our_own_packages_are_never_imported_by_a_bare_name(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & set(PACKAGES)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "dashboard")], ids=name_of
)
def test_dashboard_computes_nothing_of_its_own(path):
    tops = {name.split(".")[0] for name in imports_of(path)}

    assert not tops & {"torch", "transformers", "simpy"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "simulator")], ids=name_of
)
def test_simulator_needs_no_model(path):
    tops = {name.split(".")[0] for name in imports_of(path)}

    assert not tops & {"torch", "transformers", "safetensors", "streamlit", "plotly"}


@pytest.mark.parametrize("path", sorted(POLICY.rglob("*.py")), ids=name_of)
def test_policy_is_pure(path):
    names = set(imports_of(path))
    impure = {
        "torch", "simpy", "pandas", "pyarrow", "numpy", "time", "random", "secrets", "datetime",
        "threading", "asyncio", "os", "sys", "io", "socket", "subprocess", "logging", "uuid",
    }  # fmt: skip
    allowed = ("expertflow.simulator.policy.", *(f"expertflow.tracer.{m}." for m in PURE))

    assert not {name.split(".")[0] for name in names} & impure
    assert all(name.startswith(allowed) for name in names if name.startswith("expertflow."))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input", "exec", "eval"), node.lineno


PURE = ("types", "errors", "records")


# --- what importing costs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "expertflow.simulator.policy.spec",
        "expertflow.simulator.policy.residency",
        "expertflow.simulator.policy.replay",
        "expertflow.tracer.types",
        "expertflow.tracer.schema",
        "expertflow.tracer.store",
        "expertflow.tracer.writer",
        "expertflow.tracer.check",
        "expertflow.tracer.stats",
        "expertflow.simulator.forecast",
        "expertflow.simulator.choose",
    ],
)
def test_reading_and_deciding_need_no_torch(module):
    loaded = in_process(f"import sys, {module}; print(*sys.modules)").split()

    assert not {"torch", "transformers", "streamlit", "plotly"} & set(loaded)


def test_policy_alone_needs_no_third_party_but_numpy():
    code = "import sys, expertflow.simulator.policy.spec; print(*sys.modules)"

    assert not {"simpy", "pandas", "pyarrow", "typer", "rich"} & set(in_process(code).split())


def test_nothing_of_ours_is_loaded_a_second_time_under_a_flat_name():
    modules = [
        ".".join(("expertflow", *path.relative_to(ROOT).with_suffix("").parts))
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py")
        and path != ROOT / "dashboard" / "app.py"  # a script: importing it runs it
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(*sys.modules)"
    )

    tops = {name.split(".")[0] for name in in_process(code).split()}

    assert "expertflow" in tops
    assert not tops & set(PACKAGES)


# --- declarations ------------------------------------------------------------------------------


def test_every_folder_of_code_is_declared_as_a_package():
    declared = PROJECT["tool"]["setuptools"]["packages"]
    on_disk = {
        ".".join(("expertflow", *path.parent.relative_to(ROOT).parts))
        for path in FILES
        if path.name == "__init__.py"
    }

    assert sorted(declared) == sorted(on_disk)
    assert {path.parent / "__init__.py" for path in FILES} <= set(FILES)


def entry_points() -> Iterator[tuple[str, str]]:
    yield from PROJECT["project"]["scripts"].items()
    for group in PROJECT["project"].get("entry-points", {}).values():
        yield from group.items()


@pytest.mark.parametrize(("name", "target"), list(entry_points()))
def test_every_entry_point_leads_to_a_function(name, target):
    module, _, function = target.partition(":")
    top, *rest = module.split(".")
    path = ROOT.joinpath(*rest).with_suffix(".py")

    assert top == "expertflow"
    assert path.is_file(), f"{name}: there is no {path}"
    defined = {n.name for n in tree_of(path).body if isinstance(n, ast.FunctionDef)}
    assert function in defined, f"{name}: {path} has no {function}"


def test_tree_is_importable_under_its_name_through_the_link():
    link = ROOT / ".typing" / "expertflow"

    assert link.is_symlink()
    assert os.readlink(link) == ".."
    assert PROJECT["tool"]["pyright"]["extraPaths"] == [".typing"]


@pytest.mark.parametrize("path", MEMBERS, ids=name_of)
def test_member_file_registers_the_one_member_it_is_named_for(path):
    tree = tree_of(path)
    registered = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "MEMBER" for target in node.targets)
    ]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    assert len(registered) == 1
    assert isinstance(registered[0].value, ast.Name)
    names = [
        node.value.value
        for node in classes[registered[0].value.id].body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "name"
        and isinstance(node.value, ast.Constant)
    ]
    # A trailing underscore keeps a file from being called like a keyword.
    assert names == [path.stem.rstrip("_")]


# --- manners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_readable(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    bodies = {
        node.name: (node.end_lineno or 0) - node.body[0].lineno + 1
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert lines <= MAX_FILE_LINES
    assert {name: size for name, size in bodies.items() if size > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_ever_unpickled(path):
    tops = {name.split(".")[0] for name in imports_of(path)}

    assert not tops & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), node.lineno
            assert node.attr not in ("read_pickle", "to_pickle"), node.lineno
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), node.value.lineno
            assert node.value.value is False, node.value.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_type_information_is_shipped(package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][f"expertflow.{package}"]
