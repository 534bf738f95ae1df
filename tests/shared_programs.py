"""One cache of programs for the tests whose subject is what runs them, not how a model becomes one.

Converting a tiny Llama is two to three seconds of tracing, finding its program again is a third of one, and hundreds
of tests of programs, generation, drafts, serving and the command line start from the same few models. Each is converted
once in a run, and a hit is checked as a user's is. Tests of conversion itself (`capture/`, `passes/`, `foreign/`,
`adversarial/`, and what is marked `converts`) convert.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "TREESPEC_PROGRAM_CACHE"
ROOMS = {
    "cli",
    "codegen",
    "inspection",
    "offload",
    "program",
    "project",
    "runtime",
    "serving",
    "speculation",
    "training",
}
"""Folders under `tests/` whose programs come from the cache of the run."""

FOLDER = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures, since those of modules convert as well; processes that a test starts take it too."""
    room = item.nodeid.split("/")[1] if item.nodeid.count("/") > 1 else ""
    if room in ROOMS and item.get_closest_marker("converts") is None:
        os.environ[VARIABLE] = str(_folder(item.config))
    else:
        os.environ[VARIABLE] = "0"  # by default they would come from the cache of whoever runs the tests


def _folder(config: pytest.Config) -> Path:
    """Of this run alone: workers share it, the next run starts without."""
    if FOLDER not in config.stash:
        base = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        worker = "PYTEST_XDIST_WORKER" in os.environ
        config.stash[FOLDER] = (base.parent if worker else base) / "programs"
    return config.stash[FOLDER]
