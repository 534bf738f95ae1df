"""Folders that were compiled ahead of time: the model without its code, or nothing where it is not as written."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import some_of
from oracles import eager_row
from torch import nn
from without_transformers import PROMPT, TOKENS, say

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.cli.coverage.models import tiny_model
from treespec_compiler.errors import InvalidFolder, InvalidOption, UnsavableProgram
from treespec_compiler.options import Options
from treespec_compiler.pipeline import convert
from treespec_compiler.program.folder.loaded import LoadedProgram
from treespec_compiler.program.folder.manifest import MANIFEST, PROGRAM, WEIGHTS, Origin, read_manifest, record_of
from treespec_compiler.program.folder.weights import rehoused
from treespec_compiler.program.folder.written import Extras, write_folder
from treespec_compiler.program.saved.store import read_program, write_program
from treespec_compiler.program.tree_program import TreeProgram
from treespec_compiler.user_cache import cache_dir

EAGER = Options(lowering="eager")
# One of each kind of program: rotations, tables of positions, windows, softcaps, slopes, parallel layers, joined heads.
TYPES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "gpt2", "gemma2", "bloom", "falcon", "opt", "qwen3", "phi3", "gpt_neox")},
    "mistral": {"sliding_window": 4},
}
SOME = some_of([*TYPES])


def compiled(model: nn.Module, where: Path, **extras: Any) -> TreeProgram:
    call = call_spec(model)
    converted = convert(model, call, EAGER)
    program = TreeProgram(model, call, EAGER, converted)
    program.check()
    write_folder(where, program, model, call, converted, Extras(**extras))
    return program


def eager_greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """The ids and the model's own next ones."""
    for _ in range(count):
        ids = [*ids, int(eager_row(model, ids).argmax())]
    return ids


@functools.cache
def model_of(name: str) -> nn.Module:
    return tiny_model(name, **TYPES[name])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and what the model's own program says."""
    where = tmp_path_factory.mktemp("llama") / "llama"
    return where, say(compiled(model_of("llama"), where))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, llama: tuple[Path, Any]) -> dict[str, tuple[Path, Any]]:
    """The same of all types, by name."""
    root = tmp_path_factory.mktemp("folders")
    others = [name for name in SOME if name != "llama"]
    return {"llama": llama} | {name: (root / name, say(compiled(model_of(name), root / name))) for name in others}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the processes without transformers, with the C++ kernels: half a minute of the compiler."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "cpu").mkdir()
    for path in (cache_dir() / "cpu").glob("*.so"):
        if path.stat().st_size:
            shutil.copy2(path, cache / "cpu")
    return cache


def without_transformers(cache: Path, *folders: str) -> list[Any]:
    script = Path(__file__).with_name("without_transformers.py")
    own = os.environ | {"TREESPEC_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, script, *folders], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def alone(written: dict[str, tuple[Path, Any]], cache: Path) -> dict[str, Any]:
    """What the folders say without transformers; Llama's twice more, lowered by Inductor."""
    named = {name: f"eager={folder}" for name, (folder, _) in written.items()}
    named |= dict.fromkeys(("inductor", "inductor again"), f"inductor={written['llama'][0]}")
    return dict(zip(named, without_transformers(cache, *named.values())[:-1], strict=True))


@pytest.mark.parametrize("name", SOME)
def test_a_folder_is_the_model(name: str, written: Any, alone: dict[str, Any]) -> None:
    assert alone[name] == {**written[name][1], "compiled": 0}
    assert alone[name]["greedy"] == eager_greedy(model_of(name), PROMPT, TOKENS)


def test_a_folder_that_inductor_lowered_is_the_model(written: Any, alone: dict[str, Any]) -> None:
    assert alone["inductor"] == {**written["llama"][1], "compiled": 1}


def test_what_was_compiled_once_is_kept(alone: dict[str, Any]) -> None:
    assert alone["inductor again"] == {**alone["inductor"], "compiled": 0}


def test_a_process_that_runs_kept_code_imports_what_runs_it(written: Any, alone: dict[str, Any], cache: Path) -> None:
    found, needless = without_transformers(cache, f"inductor={written['llama'][0]}")
    assert found == alone["inductor again"] and needless == []


@pytest.fixture
def folder(tmp_path: Path, llama: tuple[Path, Any]) -> Path:
    shutil.copytree(llama[0], tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path, what: str) -> None:
    with pytest.raises(InvalidFolder, match=what):
        treespec.load_program(folder)


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """The manifest, changed in place."""
    text = json.loads((folder / MANIFEST).read_text())
    edit(text)
    (folder / MANIFEST).write_text(json.dumps(text))


def hashed(folder: Path, name: str) -> None:
    """The manifest says of a file what it is now: whoever sends a folder writes its hashes, too."""
    record = record_of(folder / name)
    change(folder, lambda text: text["files"].update({name: {"bytes": record.bytes, "sha256": record.sha256}}))


def test_weights_are_mapped_and_there_once(folder: Path) -> None:
    program = treespec.load_program(folder)
    held = list(program._module.buffers())
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(folder / WEIGHTS))]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    inside = [any(low <= t.data_ptr() < high for low, high in spans) for t in held]
    assert all(inside) and len(held) > 5
    assert program.packed_bytes == 0
    program.check()
    assert all(t.data_ptr() in {h.data_ptr() for h in held} for t in program._made.bound.tensors.values())


def test_tied_weights_and_views_are_written_once() -> None:
    tied = model_of("gpt2")
    state = convert(tied, call_spec(tied), replace(EAGER, kernels="aten")).state
    expressions, tensors = rehoused(state.weights)
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    assert {source for made in expressions.values() for source in made.sources} == set(tensors)


def test_the_models_own_defaults_come_with_it(tmp_path: Path) -> None:
    model = model_of("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", eager_greedy(model, PROMPT, 3)[-1])
        compiled(model, tmp_path / "out")
    out = treespec.generate(treespec.load_program(tmp_path / "out"), PROMPT, max_new_tokens=TOKENS)
    assert out.stats.finish_reason == "eos" and len(out.sequences[0]) <= len(PROMPT) + 3


@pytest.mark.rare
def test_drafts_come_with_it(tmp_path: Path) -> None:
    model = model_of("llama")
    where = tmp_path / "out"
    compiled(model, where, drafts=["early-exit:1", lambda inner: compiled(model, inner) and None])
    program = treespec.load_program(where)
    name, inner = program.draft
    assert name == "early-exit:1" and isinstance(inner, LoadedProgram)
    out = treespec.generate(program, PROMPT, max_new_tokens=TOKENS, draft=[name, inner], policy="chain:3")
    assert out.sequences[0].tolist() == eager_greedy(model, PROMPT, TOKENS) and out.stats.accepted
    change(where / "draft-1", lambda text: text.update(proof={}))
    with pytest.raises(InvalidFolder, match="than its own"):
        _ = program.draft


def test_options_that_are_part_of_it_stay(folder: Path) -> None:
    assert treespec.load_program(folder, {"prefill_chunk": 7}).options == Options.parse(replace(EAGER, prefill_chunk=7))
    with pytest.raises(InvalidOption, match="a compiled folder"):
        treespec.load_program(folder, {"offload": "disk"})
    with pytest.raises(InvalidOption, match="compiled with"):
        treespec.load_program(folder, {"kernels": "reference"})


def test_a_folder_made_elsewhere_says_so_and_runs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, lambda text: text["origin"].update(cpu="SVE256"))
    with caplog.at_level(logging.WARNING, logger="treespec"):
        program = treespec.load_program(folder)
    assert "CPU SVE256, here" in caplog.text and "lowered here" in caplog.text
    program.check()


def test_another_treespecs_graph_is_refused(folder: Path) -> None:
    change(folder, lambda text: text["origin"].update(ops="0123"))
    refused(folder, "ops of another treespec")


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "c:x", ""])
def test_a_name_leads_nowhere_else(folder: Path, name: str) -> None:
    change(folder, lambda text: text["files"].update({name: {"bytes": 1, "sha256": ""}}))
    refused(folder, re.escape(repr(name)))
    change(folder, lambda text: (text["files"].pop(name), text.update(drafts=[{"folder": name, "sha256": ""}])))
    refused(folder, re.escape(repr(name)))


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_changed_files(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1000] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, f"another hash of {name}")
    (folder / name).write_bytes(content[:-1])
    refused(folder, f"{name} of [0-9,]+ bytes")
    (folder / name).unlink()
    refused(folder, f"no file {name}")
    (folder / name).symlink_to("/etc/hostname")
    refused(folder, f"no file {name}")


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_huge_headers(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[:8] = struct.pack("<Q", 1 << 62)
    (folder / name).write_bytes(content)
    hashed(folder, name)
    refused(folder, "header|file")
    (folder / name).write_bytes(b"\1")
    hashed(folder, name)
    refused(folder, "header|file")


def test_other_byte_order(folder: Path) -> None:
    change(folder, lambda text: text.update(byte_order="big"))
    refused(folder, "'big' byte order")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": "treespec folder 1"}', '{"schema": "treespec folder 99"}', "[" * 100_000],
)
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    refused(folder, "does not parse")


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no folder")
    refused(tmp_path, f"no file {MANIFEST}")
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(17 << 20)
    refused(tmp_path, "17,825,792 bytes")


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """The program, changed by somebody who knows the format."""
    parts, tensors = read_program(folder / PROGRAM)
    edit(parts["program"])
    (folder / PROGRAM).unlink()
    write_program(folder / PROGRAM, parts, tensors)
    hashed(folder, PROGRAM)


def a_call(program: dict[str, Any]) -> dict[str, Any]:
    return next(node for node in program["state"]["graph"]["nodes"] if node["op"] == "call_function")


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "aten.nothing.default", "operator.call"])
def test_a_graph_calls_ops_alone(folder: Path, target: str) -> None:
    rewritten(folder, lambda program: a_call(program).update(target=target))
    refused(folder, "CannotLoad")


def test_a_graph_that_is_none(folder: Path) -> None:
    """It is read when something asks for it."""
    rewritten(folder, lambda program: a_call(program).update(name="not a name"))
    program = treespec.load_program(folder, {"verify": "off"})
    with pytest.raises(InvalidFolder, match="hold no program"):
        _ = program.graph_module
    with pytest.raises(InvalidFolder, match="hold no program"):
        program.prefill([1, 2], program.new_cache(8))


def test_weights_that_are_not_there(folder: Path) -> None:
    rewritten(folder, lambda program: program["state"]["weights"].popitem())
    refused(folder, "which nothing fills")


def test_another_graph_is_noticed_by_what_it_says(folder: Path) -> None:
    def edit(program: dict[str, Any]) -> None:
        product = next(n for n in program["state"]["graph"]["nodes"] if n.get("target") == "aten.mul.Tensor")
        product["target"] = "aten.add.Tensor"

    rewritten(folder, edit)
    program = treespec.load_program(folder)
    with pytest.raises(InvalidFolder, match="logits that differ"):
        program.new_cache(64)


def test_a_program_that_is_more_than_data_is_not_written(tmp_path: Path) -> None:
    model = model_of("llama")
    call = call_spec(model)
    converted = convert(model, call, EAGER)
    program = TreeProgram(model, call, EAGER, converted)
    converted.state.notes["mine"] = object()
    with pytest.raises(UnsavableProgram, match="notes of a user's pass"):
        write_folder(tmp_path / "out", program, model, call, converted, Extras())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.rare
def test_only_a_folder_of_its_own_is_replaced(folder: Path, tmp_path: Path) -> None:
    model = model_of("llama")
    compiled(model, folder)
    assert read_manifest(folder).origin == Origin.here()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text").write_text("mine")
    with pytest.raises(InvalidOption, match="an empty one"):
        compiled(model, tmp_path / "other")
    assert (tmp_path / "other" / "text").read_text() == "mine"
    assert {p.name for p in folder.iterdir()} == {MANIFEST, PROGRAM, WEIGHTS}
