"""Models opened from files: weights of another dtype are written once, and are what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import treespec_compiler as treespec
from treespec_compiler.checkpoints import recast as recasting
from treespec_compiler.checkpoints.recast import recast
from treespec_compiler.errors import InvalidOption, NoRoomForWeights, UnreadableModel

transformers = pytest.importorskip("transformers")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files and an index; the head is the embedding."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(BF16).save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_what_is_loaded_is_what_transformers_loads(saved: Path, tmp_path: Path) -> None:
    model = treespec.load(saved, dir=tmp_path)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=F32)
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in [*wanted.named_parameters(), *wanted.named_buffers()]:
        found: Any = model.get_parameter(name) if "inv_freq" not in name else model.get_buffer(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_written_once_and_again_when_the_model_changes(saved: Path, tmp_path: Path) -> None:
    model, under = tmp_path / "model", tmp_path / "made"
    shutil.copytree(saved, model)
    made = recast(model, F32, under)
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    assert recast(model, F32, under) == made and recast(model, BF16, under) == model
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before
    first = sorted(made.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-4])  # as a full disk would leave it
    (made / "left.tmp").touch()
    assert recast(model, F32, under) == made
    assert {file.name for file in made.iterdir()} == set(before)
    file = model / first.name
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    other = recast(model, F32, under)
    assert other != made
    assert all(torch.equal(load_file(first)[n] * 2, t) for n, t in load_file(other / first.name).items())


def test_pieces_of_a_tensor_and_numbers_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recasting, "PIECE", 16)
    tensors = {
        "odd": torch.randn(3).to(BF16),
        "long": torch.randn(7, 5).to(BF16),
        "half": torch.randn(9).half(),
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4, dtype=BF16),
    }
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    found = load_file(recast(tmp_path, F32, tmp_path / "made") / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        assert found[name].dtype == wanted.dtype and torch.equal(found[name], wanted), name


def test_quantized_weights_stay_as_they_are(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, dtype=BF16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    assert recast(tmp_path, F32, tmp_path / "made") == tmp_path


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-6])


def _without_the_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def _index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def _index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


@pytest.mark.parametrize("spoil", [_cut, _without_the_file, _long_header, _index_without_a_map, _index_elsewhere])
def test_files_that_are_damaged_are_named(spoil: Any, tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, dtype=BF16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    spoil(tmp_path)
    with pytest.raises(UnreadableModel, match=r"safetensors"):
        recast(tmp_path, F32, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_disk_without_room_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recasting.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(NoRoomForWeights, match="got 1 free bytes"):
        recast(saved, F32, tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_what_is_no_folder_or_dtype_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableModel, match="no such folder"):
        treespec.load(tmp_path / "nowhere")
    with pytest.raises(UnreadableModel, match=r"without config\.json"):
        treespec.load(tmp_path)
    with pytest.raises(InvalidOption, match="dtype"):
        treespec.load(saved, dtype=torch.int8)
