"""The ring: what is asked for, in whatever order, is there bit by bit; files that fail are told, and nothing hangs."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import assert_there, opened

from treespec_compiler.errors import WeightsUnreadable
from treespec_compiler.offload import reading

ORDERS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@settings(max_examples=25)
@given(ORDERS, st.integers(2, 7))
def test_any_order(folder: Path, order: list[tuple[int, bool]], slots: int) -> None:
    """Also where the next layer was guessed wrong, or nothing was released."""
    ring = opened(folder / f"{slots}", layers=7, slots=slots)
    for layer, released in order:
        ring.fetch(layer)
        assert_there(ring, layer)
        if released:
            ring.release(layer)


def test_passes_one_after_another(folder: Path) -> None:
    ring = opened(folder / "passes", layers=5)
    for _ in range(3):
        for layer in range(5):
            ring.fetch(layer)
            assert_there(ring, layer)
            ring.release(layer)
    for layer in (0, 1):  # read ahead, for the next pass
        ring.fetch(layer)
    size = sum(ring.store.blob(layer).bytes for layer in range(5))
    assert ring.stats.bytes == 3 * size + sum(ring.store.blob(layer).bytes for layer in (0, 1))


def test_layers_that_all_have_a_slot_are_read_once(folder: Path) -> None:
    ring = opened(folder / "all", layers=3, slots=3)
    for _ in range(4):
        for layer in range(3):
            ring.fetch(layer)
            assert_there(ring, layer)
            ring.release(layer)
    assert ring.stats.bytes == sum(ring.store.blob(layer).bytes for layer in range(3))


def test_short_reads(folder: Path, monkeypatch) -> None:
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:4096]], at))
    ring = opened(folder / "short")
    for layer in range(5):
        ring.fetch(layer)
        assert_there(ring, layer)
        ring.release(layer)


def test_a_read_that_fails_now_and_then(folder: Path, monkeypatch) -> None:
    read, count = os.preadv, iter(range(10**6))

    def flaky(file, buffers, at):
        if next(count) % 2 == 0:
            raise OSError(5, "Input/output error")
        return read(file, buffers, at)

    monkeypatch.setattr(os, "preadv", flaky)
    ring = opened(folder / "flaky", slots=2)
    ring.fetch(0)
    assert_there(ring, 0)


def test_a_disk_that_fails_and_comes_back(folder: Path, monkeypatch) -> None:
    ring = opened(folder / "broken")
    for layer in range(5):
        ring.fetch(layer)
        ring.release(layer)
    ring.fetch(0), ring.fetch(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        ring.release(0)
        with pytest.raises(WeightsUnreadable) as caught:
            ring.fetch(2)
    assert caught.value.path.endswith("layer-0002.bin") and "Input/output" in caught.value.problem
    ring.fetch(2)
    assert_there(ring, 2)


def test_a_file_that_is_gone(folder: Path) -> None:
    ring = opened(folder / "gone")
    path = ring.store.blob(4).path
    path.rename(path.with_suffix(".away"))
    with pytest.raises(WeightsUnreadable, match="layer-0004"):
        ring.fetch(4)
    path.with_suffix(".away").rename(path)
    ring.fetch(4)
    assert_there(ring, 4)


def test_a_file_that_ends_early(folder: Path) -> None:
    """After the store was opened; before, it would be written anew."""
    ring = opened(folder / "early")
    path = ring.store.blob(3).path
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(WeightsUnreadable, match="end of the file"):
        ring.fetch(3)


def test_bytes_that_were_changed_on_the_disk(folder: Path, caplog) -> None:
    path = opened(folder / "changed").store.blob(3).path
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    ring = opened(folder / "changed")
    ring.fetch(3)
    assert_there(ring, 3)
    assert "layer 3" in caplog.text and path.read_bytes() != damaged


def test_file_systems_without_direct_reads(folder: Path, monkeypatch) -> None:
    opens = os.open

    def refused(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opens(path, flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    ring = opened(folder / "plain")
    ring.fetch(1)
    assert_there(ring, 1)


def test_its_threads_end_with_it(folder: Path) -> None:
    before = set(threading.enumerate())
    ring = opened(folder / "threads")
    ring.fetch(0)
    mine = [t for t in threading.enumerate() if t not in before]
    assert mine
    del ring
    gc.collect()
    for thread in mine:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_piece_is_no_longer_than_it_is_said(folder: Path, monkeypatch) -> None:
    """Layers larger than one read."""
    monkeypatch.setattr(reading, "PIECE", 4096)
    ring = opened(folder / "pieces")
    for layer in (2, 0, 4):
        ring.fetch(layer)
        assert_there(ring, layer)
