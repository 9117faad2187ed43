"""What the probe says of the machine, and what it keeps to itself."""

import subprocess
import sys
from datetime import UTC, datetime

import pytest
from expertflow.tracer import probe


def test_versions_name_python_and_the_toolkit():
    found = probe.versions()

    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["expertflow-trace"][0].isdigit()
    assert found["pyarrow"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/opt/x/bin/expertflow-trace", "run", "--out", "my traces/a"], "run --out 'my traces/a'"),
        (["/srv/tree/tracer/__main__.py", "info", "/data/t"], "info /data/t"),
    ],
)
def test_command_is_as_typed_without_the_way_to_the_program(monkeypatch, argv, told):
    monkeypatch.setattr(sys, "argv", argv)

    assert probe.command_line() == f"expertflow-trace {told}"


def test_provenance_is_in_utc():
    made = probe.provenance(3, "teacher-forced", command="x", notes=["n"])

    created = datetime.fromisoformat(made.created)
    assert created.utcoffset() == datetime.now(UTC).utcoffset()
    assert (made.seed, made.text, made.command, made.notes) == (3, "teacher-forced", "x", ("n",))


def test_machine_has_a_name_and_memory():
    assert probe.cpu_model() in probe.machine_name()
    assert probe.host_bytes() > 1 << 20
    assert probe.device_bytes("cpu") == probe.host_bytes()
    assert probe.cpu_count() >= 1


def test_gpus_come_from_nvidia_smi(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100, 550.54, 81559, 5, 5, 16, 16'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    (gpu,) = probe.gpus()

    assert (gpu.name, gpu.memory_bytes, gpu.link_width) == ("NVIDIA H100", 81559 << 20, "16")
    assert probe.machine_name("cuda:0").startswith("NVIDIA H100 (")


def test_broken_nvidia_smi_means_no_gpus(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert probe.gpus() == ()


def test_importing_the_probe_imports_no_torch():
    code = "import sys, expertflow.tracer.probe; print('torch' in sys.modules)"
    paths = repr(sys.path)

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {paths}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "False"
