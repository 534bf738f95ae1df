"""Files and folders of saved programs that are not what they should be, and processes that meet there."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from saved_home import LOGGER, TEXTS, Home

import treespec_compiler as treespec
from treespec_compiler.program.saved import store


def test_a_program_that_is_wrong_is_given_up(saved: Home, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, lambda text: text.replace('"aten.silu.default"', '"aten.relu.default"'))
    with caplog.at_level(logging.WARNING, LOGGER):
        found = saved.right(saved.model())
    assert not found.from_cache
    assert str(saved.files[0]) in caplog.text and "given up" in caplog.text
    assert saved.right(saved.model()).from_cache  # it was saved anew


def rewrite(home: Home, change: Callable[[str], str], **others: str) -> None:
    """Write the program's file again, with another program and a right checksum."""
    (path,) = home.files
    with safe_open(str(path), "pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts = {part: about[part] for part in ("about", "trace", "program")}
    before = texts["program"]
    texts["program"] = change(before)
    assert texts["program"] != before or others
    save_file(tensors, path, {"schema": store.SCHEMA, **texts, "checksum": store._checksum(texts, tensors), **others})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def foreign(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)


def pickled(path: Path) -> None:
    torch.save({"x": 1}, path)


def link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncated, cut_in_header, empty, other_byte, huge_header, foreign, pickled, link, folder)


@pytest.mark.family
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_and_not_used(
    saved: Home, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = saved.files[0]
    damage(path)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert f"{path} is not used" in caplog.text


@pytest.mark.family
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"aten.silu.default"', '"os.system"'),
        ('"aten.silu.default"', '"builtins.eval"'),
        ('"name":"silu"', '"name":"silu\\nimport os"'),
        ('"graph":', '"other":'),
        ('"sites":[', '"sites":[1,'),
        ('["source","embed.weight"', '["exec","embed.weight"'),
    ],
)
def test_a_malicious_program_is_named_and_not_used(
    saved: Home, before: str, after: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(saved, lambda text: text.replace(before, after.replace("\n", "\\n")))
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert f"{saved.files[0]} is not used" in caplog.text


@pytest.mark.rare
def test_another_schema_is_not_read(saved: Home, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, lambda text: text, schema="treespec program 0")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert "treespec program 0" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
@pytest.mark.rare
def test_what_another_user_wrote_is_not_read(
    saved: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uid = os.getuid()
    monkeypatch.setattr(store.os, "getuid", lambda: uid + 1)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert "another user" in caplog.text


@pytest.mark.rare
def test_a_file_larger_than_any_program_is_not_read(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST", 1000)
    assert not saved.right(saved.model()).from_cache


@pytest.mark.rare
def test_a_program_of_another_models_tensors_is_not_used(saved: Home) -> None:
    rewrite(saved, lambda text: text.replace('"head.weight"', '"../head.weight"'))
    assert not saved.right(saved.model()).from_cache


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.rare
def test_a_full_disk_is_named(home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(store, "save_file", full)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not home.right(home.model()).from_cache
    assert str(home.programs) in caplog.text and "No space left" in caplog.text
    assert not list(home.programs.iterdir())


def test_a_folder_that_cannot_be_written_is_named(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.programs.write_text("a file, in the folder's place")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not home.right(home.model()).from_cache
    assert str(home.programs) in caplog.text


def test_a_read_only_folder_is_read(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.os, "utime", refuse)
    assert saved.right(saved.model()).from_cache


def test_a_killed_writer_leaves_nothing_that_is_read(saved: Home) -> None:
    half = saved.programs / "half.program.tmp"
    half.write_bytes(saved.files[0].read_bytes()[:50])
    assert saved.right(saved.model()).from_cache
    long_ago = time.time() - 7200
    os.utime(half, (long_ago, long_ago))
    saved.right(saved.model(TEXTS["a method"]))  # saves one more
    assert not half.exists()


def test_the_least_recently_used_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = store.Store(tmp_path)
    monkeypatch.setattr(store, "MOST_FILES", 2)
    for number, name in enumerate(("a", "b", "c")):
        if name == "c":
            where.touch(next(entry for entry in where.entries() if entry.name == "a"))
        assert where.write(name, {"about": {}, "trace": {}, "program": {}}, {})
        os.utime(tmp_path / f"{name}.program", (number + 1.0, number + 1.0)) if name != "c" else None
    assert {entry.name for entry in where.entries()} == {"a", "c"}
    monkeypatch.setattr(store, "MOST_BYTES", 1)
    assert where.write("d", {"about": {}, "trace": {}, "program": {}}, {})
    assert [entry.name for entry in where.entries()] == ["d"]


# --- processes


def start(home: Home) -> subprocess.Popen[str]:
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[3:]; from saved_model import module_of; from pathlib import Path\n"
        "import treespec_compiler as treespec; torch.manual_seed(0)\n"
        "model = module_of(Path(sys.argv[2])).Decoder().eval()\n"
        "options = {'lowering': 'eager', 'program_cache': sys.argv[1]}\n"
        "out = treespec.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, options=options)\n"
        "print(out.stats.program_from_cache, out.sequences.tolist())\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(home.programs), str(home.text), str(here), str(here.parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here.parents[1])


@pytest.mark.rare
def test_two_processes_at_once_and_a_third(home: Home) -> None:
    together = [start(home) for _ in range(2)]
    said = [each.communicate(timeout=300)[0].split(" ", 1) for each in together]
    found, third = start(home).communicate(timeout=300)[0].split(" ", 1)
    assert {tokens for _, tokens in said} == {third}
    assert found == "True" and len(home.files) == 1
    plain = treespec.generate(home.model(), torch.tensor([[1, 2, 3]]), max_new_tokens=8, options={"lowering": "eager"})
    assert third.strip() == str(plain.sequences.tolist())
