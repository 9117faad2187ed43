"""Builders for the simulator's tests: shapes, machines and workloads with round numbers."""

# ruff: noqa: E402

from collections.abc import Callable

import pytest

# Before the first import of them, or a failing contract would not show its values.
pytest.register_assert_rewrite(
    "expertflow.simulator.policy.checked", "expertflow.simulator.policy.testing"
)

from expertflow.simulator.costs import CostModel
from expertflow.simulator.policy.checked import tiny_shape
from expertflow.simulator.workload import Workload
from expertflow.tracer.synthetic import synthetic_trace
from expertflow.tracer.types import ModelShape

from tests.builders import make_machine, make_steps


@pytest.fixture(scope="session")
def machine() -> Callable[..., CostModel]:
    return make_machine


@pytest.fixture(scope="session")
def steps_of() -> Callable[..., Workload]:
    return make_steps


@pytest.fixture(scope="session")
def shape_of() -> Callable[..., ModelShape]:
    return tiny_shape


@pytest.fixture(scope="session")
def trace(tmp_path_factory):
    """A synthetic trace with look-ahead ids; do not change it."""
    return synthetic_trace(
        tmp_path_factory.mktemp("simulator") / "t", sequences=8, new_tokens=12, prompt_tokens=8
    )
