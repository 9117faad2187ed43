"""The command line: quick help, exit codes, near names, streams and what is not imported."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from expertflow.tracer import main as main_module
from expertflow.tracer.commands import doctor as doctor_module
from expertflow.tracer.errors import (
    ExpertFlowError,
    NotValidatedError,
    PolicyError,
    ResourceError,
    TraceError,
    UsageError,
)
from expertflow.tracer.synthetic import synthetic_trace

HEAVY = ("torch", "pandas", "pyarrow", "transformers", "streamlit", "numpy")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(tmp_path_factory.mktemp("command") / "t").path


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "EXPERTFLOW_DEBUG")}
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200", **more}


def command(*args: str, **more: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "expertflow.tracer", *args]
    return subprocess.run(
        line, capture_output=True, text=True, env=environment(**more), timeout=120
    )


def test_help_lists_every_command_with_a_line():
    done = command("--help")

    assert done.returncode == 0
    for name in ("run", "info", "check", "doctor", "simulate", "tune", "list", "deploy", "verify"):
        assert f" {name} " in done.stdout
    assert "Show what a trace holds" in done.stdout


def imported_by(*args: str) -> set[str]:
    code = (
        "import sys\n"
        "from expertflow.tracer.main import main\n"
        f"try: main({list(args)!r})\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0
    return set(done.stderr.split())


def test_help_imports_nothing_heavy_and_no_command():
    imported = imported_by("--help")

    assert not imported & set(HEAVY)
    ours = {name for name in imported if name.startswith("expertflow.")}
    # An editable install finds a module through its parents: packages that hold a docstring.
    packages = {
        f"expertflow.{name}{more}"
        for name in ("tracer", "simulator", "runtime", "dashboard")
        for more in ("", ".commands")
    }
    assert ours - packages == {"expertflow.tracer.main", "expertflow.tracer.errors"}


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick():
    taken: list[float] = []
    for _ in range(5):
        start = children_cpu_s()
        command("--help")
        taken.append(children_cpu_s() - start)  # its own time: others may keep the machine busy

    assert min(taken) < 0.4


def test_one_command_imports_only_itself(trace):
    imported = imported_by("info", str(trace))

    assert "expertflow.tracer.commands.info" in imported
    assert "expertflow.tracer.commands.doctor" not in imported
    assert not imported & {"torch", "transformers", "simpy"}


def test_no_arguments_print_help_and_exit_two():
    done = command()

    assert done.returncode == 2
    assert "Usage: expertflow-trace" in done.stdout


def test_unknown_command_names_the_nearest():
    done = command("infoo")

    assert done.returncode == 2
    assert "Did you mean 'info'?" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("args", [("info",), ("info", "--nonsense"), ("--nonsense",)])
def test_wrong_usage_exits_two_on_stderr(args):
    done = command(*args)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_version_is_one_line():
    done = command("--version")

    assert done.returncode == 0
    assert done.stdout.startswith("expertflow-trace ")
    assert done.stdout.count("\n") == 1


def test_info_shows_model_link_and_readings(trace):
    done = command("info", str(trace))

    assert done.returncode == 0
    for words in ("synthetic-4x16-top2", "declared PCIe", "r = ", "by chance", "total variation"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_info_json_is_one_document(trace):
    document = json.loads(command("info", str(trace), "--json").stdout)

    assert document["format"] == "expertflow.info/1"
    assert document["shape"]["num_experts"] == 16
    assert document["stats"]["decode"]["mean_distinct"] > 0


def test_check_of_a_sound_trace_is_zero_and_of_a_damaged_one_three(trace, tmp_path):
    copy = synthetic_trace(tmp_path / "t").path
    assert command("check", str(copy)).returncode == 0

    part = copy / "routing/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    done = command("check", str(copy))

    assert done.returncode == 3
    assert done.stderr.startswith(f"error: {part}")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    for done in (
        command("--debug", "info", str(tmp_path / "none")),
        command("info", str(tmp_path / "none"), "--debug"),
        command("info", str(tmp_path / "none"), EXPERTFLOW_DEBUG="1"),
    ):
        assert done.returncode == 3
        assert "Traceback" in done.stderr


def test_reader_that_has_enough_is_no_error(trace):
    line = f'"{sys.executable}" -m expertflow.tracer info "{trace}" --json | head -c 10'

    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment(), timeout=60
    )

    assert done.stdout == '{\n  "forma'
    assert done.stderr == ""


def in_a_shell(line: str, **more: str) -> subprocess.CompletedProcess:
    line = line.replace("COMMAND", f'"{sys.executable}" -m expertflow.tracer')
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment(**more), timeout=60
    )


@pytest.mark.parametrize("words", ["--help", "list", "list --json"])
def test_every_command_ends_alike_when_its_reader_goes_away(words):
    done = in_a_shell(f"COMMAND {words} | true; echo ${{PIPESTATUS[0]}}")

    assert done.stdout == "141\n"
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["--help", "list", "list --json", "--version"])
def test_nobody_need_listen(words):
    done = in_a_shell(f"COMMAND {words} >&-")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_the_code_is_told_even_if_the_words_cannot_be(stderr):
    assert in_a_shell(f"COMMAND info none {stderr}").returncode == 3


def test_letters_that_a_terminal_lacks_end_no_command():
    plain = command("list", PYTHONIOENCODING="ascii")
    document = command("list", "--json", PYTHONIOENCODING="latin-1")

    assert (plain.returncode, plain.stderr) == (0, "")
    assert "\\u2212" in plain.stdout
    assert json.loads(document.stdout) == json.loads(command("list", "--json").stdout)


def test_a_window_of_no_width_shows_what_there_is():
    assert command("list", COLUMNS="0").stdout == command("list").stdout


def test_a_folder_that_was_removed_is_named(tmp_path, trace):
    place = tmp_path / "gone"
    place.mkdir()
    asked = ["sample", str(trace), "--sequences", "1", "--out", "x"]
    # Gone only once Python runs: it does not always start where there is no folder.
    code = (
        "import os; from expertflow.tracer.main import main\n"
        f"os.chdir({str(place)!r}); os.rmdir({str(place)!r}); main({asked!r})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60
    )

    assert done.returncode == 4
    assert "current folder no longer exists" in done.stderr


def test_help_breaks_lines_where_the_window_ends_and_nowhere_else():
    helped = command("check", "--help", COLUMNS="300").stdout

    assert "Of a run that was cut off it says how far it came, and ends with code 3 too." in helped


def test_doctor_speaks_json_and_text():
    document = json.loads(command("doctor", "--json").stdout)
    text = command("doctor").stdout

    assert document["format"] == "expertflow.doctor/1"
    assert document["cpu"]["cores"] >= 1
    assert "pyarrow" in text


def test_doctor_works_without_torch_and_says_what_to_install(monkeypatch, tmp_path):
    real = doctor_module.probe.installed_version
    absent = ("torch", "transformers")
    monkeypatch.setattr(
        doctor_module.probe,
        "installed_version",
        lambda name: None if name in absent else real(name),
    )
    monkeypatch.setitem(sys.modules, "torch", None)

    document = doctor_module.examine()

    assert document["cuda"] == {"usable": False, "why": "torch is not installed"}
    fixes = [item["fix"] for item in document["extras_missing"]]
    assert "pip install 'expertflow-trace[model]'" in fixes


PLUGIN = '''"""A plugin."""
import {imports}
from expertflow.tracer import errors

def plugin(name: str = "x") -> None:
    """Do {what} things."""
    {body}
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a third party's command as its wheel would: a module and its entry point."""

    def install(body: str, imports: str = "errno", what: str = "plugged") -> None:
        text = PLUGIN.format(body=body, imports=imports, what=what)
        (tmp_path / "acme_plugin.py").write_text(text)
        info = tmp_path / "acme-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[expertflow.commands]\nplug = acme_plugin:plugin\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_third_party_commands_are_found_and_listed(plugin):
    plugin('print("plugged in", name)')

    assert "Do plugged things." in command("--help").stdout
    assert command("plug", "--name", "y").stdout == "plugged in y\n"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ('raise errors.ExpertFlowError("oh")', 1, "error: oh"),
        ('raise errors.UsageError("oh")', 2, "error: oh"),
        ('raise errors.PolicyError("oh")', 3, "error: oh"),
        ('raise errors.ResourceError("oh")', 4, "error: oh"),
        ('raise errors.NotValidatedError("oh")', 5, "error: oh"),
        ("raise KeyboardInterrupt", 130, "Interrupted."),
        ('raise RuntimeError("set_name") from KeyboardInterrupt()', 130, "Interrupted."),
        ("raise MemoryError", 4, "Out of memory"),
        ('raise OSError(errno.ENOSPC, "full")', 4, "disk is full"),
        ('raise ValueError("odd [x]")', 1, "ValueError: odd [x] This is a bug; EXPERTFLOW_DEBUG=1"),
        ("import psutil_ as torch", 1, "ModuleNotFoundError"),
        ("raise SystemExit(7)", 7, ""),
    ],
)
def test_every_end_has_its_code_and_one_line(plugin, body, code, words):
    plugin(body)

    done = command("plug")

    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_command_that_lacks_a_library_is_a_resource_error(plugin):
    plugin("pass", imports="a_library_nobody_has")

    done = command("plug")

    assert done.returncode == 4
    assert "a_library_nobody_has" in done.stderr


def test_missing_extra_names_the_pip_command():
    error = ModuleNotFoundError("No module named 'torch'", name="torch")

    message, code = main_module._explain(error, False)

    assert code == 4
    assert "pip install 'expertflow-trace[model]'" in message


def test_exit_codes_are_those_of_the_error_tree():
    tree = (ExpertFlowError, UsageError, TraceError, PolicyError, ResourceError, NotValidatedError)

    assert [kind.exit_code for kind in tree] == [1, 2, 3, 3, 4, 5]


def test_every_declared_command_of_this_package_exists():
    targets = main_module.commands()

    for name in ("info", "check", "doctor"):
        assert callable(main_module._load(name, targets[name]))
        assert main_module.one_line_help(targets[name])[-1] == "."


def test_salvage_by_the_command(tmp_path):
    synthetic_trace(tmp_path / "t").path.rename(tmp_path / "t.partial")

    done = command("check", str(tmp_path / "t.partial"), "--salvage", str(tmp_path / "t"))

    assert done.returncode == 0
    assert Path(tmp_path / "t" / "manifest.json").is_file()
