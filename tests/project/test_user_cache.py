"""The user's cache directory, and files that are there whole or not at all."""

from __future__ import annotations

import pytest

from treespec_compiler import user_cache
from treespec_compiler.errors import CorruptTable


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("TREESPEC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.cache_dir() == tmp_path / "treespec"
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "own"))
    assert user_cache.cache_dir() == tmp_path / "own"


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    for text in ("one", "two"):
        user_cache.write_whole(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    user_cache.write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        user_cache.write_whole(path, "\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "JSONDecodeError"), ("[]", "a list"), ('{"schema": 1}', "schema 1"), ("{}", "schema None")],
)
def test_tables_of_another_schema_are_named(tmp_path, text, problem):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(CorruptTable, match=r"expected a JSON object|JSONDecodeError") as caught:
        user_cache.read_table(path, 2)
    assert problem in str(caught.value) and str(path) in str(caught.value)
