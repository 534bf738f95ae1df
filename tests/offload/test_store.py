"""Blobs of layers: written once, opened again, and written anew where they are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from streams import streaming, weight

from treespec_compiler.errors import InvalidOption, NoRoomForWeights
from treespec_compiler.offload.store import MANIFEST, WeightStore, padded


def store(folder: Path) -> WeightStore:
    return WeightStore(folder, streaming(), "key", weight)


def test_written_once(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert first.written == sum(padded(layer.bytes) for layer in streaming().layers)
    before = {path.name: path.read_bytes() for path in (tmp_path / "key").iterdir()}
    assert sorted(before) == [*(f"layer-{i:04d}.bin" for i in range(5)), MANIFEST]
    assert store(tmp_path).written == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "key").iterdir()} == before


def _gone(path: Path) -> None:
    path.unlink()


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def _long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(4096))


@pytest.mark.parametrize("damage", [_gone, _short, _long])
def test_a_blob_that_is_not_whole_is_written_anew(tmp_path: Path, damage, caplog) -> None:
    wanted = store(tmp_path).blob(3)
    good = wanted.path.read_bytes()
    damage(wanted.path)
    again = store(tmp_path)
    assert again.written == wanted.bytes and again.blob(3) == wanted
    assert wanted.path.read_bytes() == good
    assert "layer 3" in caplog.text and str(tmp_path) in caplog.text


def _half(text: str) -> str:
    return text[: len(text) // 2]


def _other_version(text: str) -> str:
    return json.dumps({**json.loads(text), "version": 0})


def _other_length(text: str) -> str:
    found = json.loads(text)
    found["blobs"] = [row | {"bytes": 2**60} for row in found["blobs"]]
    return json.dumps(found)


def _elsewhere(text: str) -> str:
    """Names in it are not followed."""
    found = json.loads(text)
    found["blobs"] = [row | {"file": "../../../etc/passwd", "crc": "x"} for row in found["blobs"]]
    return json.dumps(found)


@pytest.mark.parametrize(
    "change",
    [
        _half,
        lambda text: "[]",
        lambda text: "7",
        _other_version,
        _other_length,
        _elsewhere,
    ],
)
def test_a_manifest_that_says_nothing_true(tmp_path: Path, change, caplog) -> None:
    path = store(tmp_path).folder / MANIFEST
    good = path.read_text()
    path.write_text(change(good))
    assert store(tmp_path).written == sum(padded(layer.bytes) for layer in streaming().layers)
    assert path.read_text() == good and str(path) in caplog.text


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(NoRoomForWeights) as caught:
        store(tmp_path)
    assert caught.value.free == 5000 and caught.value.needed > 5000
    assert not list((tmp_path / "key").iterdir())


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch) -> None:
    """What was written stays, nothing half is left, and the next one goes on."""
    made = []

    def limited(name: str):
        if name.startswith("w2"):
            raise OSError(28, "No space left on device")
        made.append(name)
        return weight(name)

    with pytest.raises(OSError, match="No space left"):
        WeightStore(tmp_path, streaming(), "key", limited)
    assert sorted(path.name for path in (tmp_path / "key").iterdir()) == ["layer-0000.bin", "layer-0001.bin"]
    assert store(tmp_path).written > 0 and store(tmp_path).written == 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match="folder"):
        store(tmp_path / "file")
