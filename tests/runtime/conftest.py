"""The runtime's tests run on one thread and on one tiny model, traced once."""

import pytest
import torch

from tests.runtime.bench import Bench


@pytest.fixture(autouse=True)
def _one_thread():
    yield
    torch.set_num_threads(1)  # commands under test set their own


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.close()
