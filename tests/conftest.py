"""Settings every test runs under."""

from __future__ import annotations

import os
from types import SimpleNamespace

# NOTE: before torch loads OpenMP. With a busy neighbour, spinning threads wait milliseconds at every barrier.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# By default each worker would keep a pool of compiling processes of its own, and so would every process that a test
# starts: seconds of imports each, before anything is compiled.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from costs import pytest_terminal_summary  # noqa: F401  hook
from families import leave_out
from hypothesis import settings
from shared_programs import pytest_runtest_setup  # noqa: F401  hook
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401  hooks

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)  # what depends on their number sets it: test_cpu_kernels.py, test_checksums.py

settings.register_profile("treespec", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("treespec")


@pytest.hookimpl(trylast=True)  # after `-k` and `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _latency_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tables measured by tests stay out of the user's cache."""
    from treespec_compiler.speculation.cost import latency as cost

    folder = tmp_path_factory.mktemp("latency")
    cost.table_path = lambda key: folder / f"{key}.json"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two tiny saved Llamas, as models of the command line."""
    from tiny_pair import saved_pair

    return saved_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
