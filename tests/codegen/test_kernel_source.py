"""Generated source files and compile-only builds, on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from treespec_compiler.codegen.gpu import offline, source

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(source, "_LOADED", {})
    return tmp_path / "kernels"


def test_a_file_carries_its_spec_and_versions(cache):
    path = source.write("double", {"dtype": "fp32", "heads": 4}, "VALUE = 1\n")
    text = path.read_text()
    assert path.parent == cache and path.name.startswith("double-")
    assert "dtype=fp32, heads=4" in text and source.source_hash("VALUE = 1\n") in text
    assert all(f"{name} {version}" in text for name, version in source.kernel_versions().items())


def test_a_module_is_imported_once_and_other_source_is_another_file(cache):
    first = source.load("one", {}, "VALUE = object()\n")
    assert source.load("one", {}, "VALUE = object()\n") is first
    assert source.load("one", {"a": 1}, "VALUE = object()\n") is not first
    assert len(list(cache.glob("*.py"))) == 2
    assert first.__name__.removeprefix("treespec_kernels.one_") in first.__file__  # one hash for both


def test_a_damaged_file_is_replaced(cache):
    path = source.write("one", {}, "VALUE = 1\n")
    path.write_text("VALUE = ")
    assert source.load("one", {}, "VALUE = 1\n").VALUE == 1


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "file"))
    assert source.load("unwritable", {}, "VALUE = 2\n").VALUE == 2
    assert "cannot be written" in caplog.text


def test_broken_source_leaves_no_module(cache):
    with pytest.raises(ZeroDivisionError):
        source.load("broken", {}, "1 / 0\n")
    assert not source._LOADED and not [m for m in sys.modules if m.startswith("treespec_kernels.broken")]


def test_concurrent_writers_leave_one_whole_file(cache):
    text = "".join(f"VALUE_{i} = {i}\n" for i in range(5000))
    program = f"from treespec_compiler.codegen.gpu import source; source.write('many', {{}}, {text!r})"
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: source.write("many", {}, text), range(32)))
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(set(paths)) == 1 and paths[0].read_text().endswith(text)
    assert [p.name for p in cache.iterdir()] == [paths[0].name]


@pytest.mark.parametrize("target", offline.TARGETS)
def test_compile_offline(cache, target):
    pytest.importorskip("triton", reason="triton is not installed")
    kernel = source.load("double", {}, KERNEL).double
    built = offline.compile_offline(
        kernel, {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"BLOCK": 256}, target, divisible=("x", "y")
    )
    assert built.resources.registers > 0 and built.resources.fits
    assert built.has("buffer_store" if target == "gfx942" else "STG") and not built.has("HGMMA")


def test_compile_offline_says_what_it_needs(cache):
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match="expected one of sm_80"):
        offline.compile_offline(None, {}, {}, target="sm_1")
    with pytest.raises(ValueError, match=r"expected a triton\.jit function"):
        offline.compile_offline(print, {}, {})
