"""Fixtures of the tests of saved programs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from saved_home import Home


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model's text lies: a program of another file is another one."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def home(tmp_path: Path, text: Path) -> Home:
    return Home(tmp_path, text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The saved program of the model as it is."""
    home = Home(tmp_path_factory.mktemp("written"), text)
    assert not home.right(home.model()).from_cache
    (path,) = home.files
    return path


@pytest.fixture
def saved(home: Home, written: Path) -> Home:
    home.programs.mkdir()
    shutil.copy(written, home.programs)
    return home


@pytest.fixture(autouse=True)
def _no_program_of_an_earlier_test() -> Iterator[None]:
    yield
    sys.modules.pop("saved_model_text", None)
