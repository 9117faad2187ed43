"""Free host memory is the machine's, or what the container's limit leaves."""

import psutil
import pytest
from expertflow.tracer.host_memory import available_host_bytes

MIB = 2**20


def limits(root, **files) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


def test_without_a_container_the_machine_tells(tmp_path):
    free = psutil.virtual_memory().available

    assert available_host_bytes(tmp_path) == pytest.approx(free, rel=0.2)


def test_a_limit_of_cgroup_2_counts_its_page_cache_as_free(tmp_path):
    limits(
        tmp_path,
        memory_dot_max=f"{64 * MIB}\n",
        memory_dot_current=f"{40 * MIB}\n",
        memory_dot_stat=f"anon 1\ninactive_file {8 * MIB}\nactive_file 5\n",
    )

    assert available_host_bytes(tmp_path) == 32 * MIB


def test_a_limit_of_cgroup_1_is_read_too(tmp_path):
    limits(
        tmp_path,
        memory__memory_dot_limit_in_bytes=f"{10 * MIB}",
        memory__memory_dot_usage_in_bytes=f"{4 * MIB}",
    )

    assert available_host_bytes(tmp_path) == 6 * MIB


@pytest.mark.parametrize("limit", ["max", "", "many"])
def test_no_limit_or_one_that_cannot_be_read_is_none(tmp_path, limit):
    limits(tmp_path, memory_dot_max=limit, memory_dot_current=f"{4 * MIB}")

    assert available_host_bytes(tmp_path) > 100 * MIB


def test_a_container_over_its_limit_has_nothing_left(tmp_path):
    limits(tmp_path, memory_dot_max=f"{MIB}", memory_dot_current=f"{2 * MIB}")

    assert available_host_bytes(tmp_path) == 0
