"""What goes wrong around a store: processes that are killed or meet, folders that vanish, slow and full disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from streams import assert_there, opened, streaming, weight

from treespec_compiler.errors import NoRoomForWeights, WeightsUnreadable
from treespec_compiler.offload.store import MANIFEST, WeightStore, padded

TESTS = Path(__file__).resolve().parents[1]
WHOLE = sum(padded(layer.bytes) for layer in streaming().layers)


def process(folder: Path, *how: str) -> subprocess.Popen[str]:
    script = TESTS / "offload" / "store_process.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, str(script), str(folder), *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.rare
def test_killed_while_a_file_is_written_and_two_that_go_on_at_once(tmp_path: Path) -> None:
    killed = process(tmp_path, "killed")
    assert killed.wait() == -signal.SIGKILL
    left = {path.suffix: path for path in (tmp_path / "key").iterdir()}
    assert set(left) == {".bin", ".tmp"} and not (tmp_path / "key" / MANIFEST).exists()
    both = [process(tmp_path) for _ in range(2)]
    written = sorted(int(each.communicate()[0]) for each in both)
    assert written == [0, WHOLE]  # one of them, and the other found what it wrote
    assert not list((tmp_path / "key").glob("*.tmp"))
    ring = opened(tmp_path)
    for layer in range(5):
        ring.fetch(layer)
        assert_there(ring, layer)


def test_a_folder_that_is_removed(tmp_path: Path) -> None:
    ring = opened(tmp_path)
    for layer in (0, 1):
        ring.fetch(layer)
    shutil.rmtree(tmp_path / "key")
    with pytest.raises(WeightsUnreadable, match="layer-0004"):
        ring.fetch(4)
    again = opened(tmp_path)  # as a new program does
    again.fetch(4)
    assert_there(again, 4)


def test_a_slow_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = opened(tmp_path)
    read = os.preadv

    def slow(*arguments):
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    before = ring.stats.waited
    for layer in (2, 3, 4):
        ring.fetch(layer)
        assert_there(ring, layer)
    assert ring.stats.waited > before


def test_a_disk_that_gets_full_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NoRoomForWeights) as caught:
        patch.setattr(os, "fsync", full)
        WeightStore(tmp_path, streaming(), "key", weight)
    assert caught.value.needed == padded(streaming().layers[0].bytes)
    assert list((tmp_path / "key").iterdir()) == []
    assert WeightStore(tmp_path, streaming(), "key", weight).written == WHOLE
