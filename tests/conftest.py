"""Shared settings: one thread, one table of tolerances."""

import hypothesis
import pytest
import torch

from bilevel import plugins

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

hypothesis.settings.register_profile("bilevel", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("bilevel")


def pytest_sessionstart():
    if not plugins.names("solver"):  # many tests would be skipped for want of parameters
        pytest.exit("bilevel is on the path but not installed: pip install -e .", returncode=4)


def pytest_collection_modifyitems(items):
    """Machines with GPUs have packages, drivers and hosts of their own, which warn of theirs."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
