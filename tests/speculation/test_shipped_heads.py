"""Heads that come with the package: their names, their size, and that they fit a target of the shape they are for."""

from __future__ import annotations

import os

import pytest
import torch
from llamas import EAGER

import treespec_compiler as treespec
from treespec_compiler.cli.models import load
from treespec_compiler.errors import UnreadableModel
from treespec_compiler.program.tree_program import tree_program
from treespec_compiler.speculation.drafts.heads.checkpoint import (
    SHIPPED,
    named_folder,
    read_config,
    read_tensors,
    shipped,
)
from treespec_compiler.speculation.drafts.heads.parallel import LoadedParallel

CARD = ("## Data", "## Training", "## Licence")
PROMPT = [1, 2, 3, 5, 8]
QUESTION = "Explain in a few sentences how rain forms."


def a_target_of_its_shape():
    """SmolLM2's width, layers and vocabulary, and next to nothing inside each layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    inside = {"intermediate_size": 32, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
    config = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30, tie_word_embeddings=True, **inside)
    return LlamaForCausalLM(config).eval()


def test_they_are_found_by_name_and_are_small():
    assert shipped("parallel") == ["smollm2"] and not shipped("medusa")
    folder, _ = named_folder("smollm2", "parallel", "")
    assert folder == SHIPPED / "parallel" / "smollm2"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    card = (folder / "README.md").read_text("utf-8")
    assert all(part in card for part in CARD)
    assert f"{read_config(folder)['training']['tokens_per_step']} tokens a step" in card


def test_a_folder_of_that_name_is_written_with_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert named_folder("smollm2", "parallel", "")[0] == SHIPPED / "parallel" / "smollm2"
    with pytest.raises(UnreadableModel, match="smollm2"):
        named_folder("./smollm2", "parallel", "")


def test_another_kind_has_none_of_that_name():
    with pytest.raises(UnreadableModel, match="smollm2"):
        named_folder("smollm2", "eagle3", "")


def test_its_numbers_are_finite_and_as_its_configuration_says():
    folder, config = SHIPPED / "parallel" / "smollm2", read_config(SHIPPED / "parallel" / "smollm2")
    tensors = read_tensors(folder)
    assert len(tensors["d2t"]) == int(tensors["t2d"].sum()) == config["draft_vocab_size"]
    assert tensors["lm_head.weight"].shape == (config["draft_vocab_size"], config["hidden_size"])
    numbers = [x for x in tensors.values() if x.is_floating_point()]
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in numbers)


@pytest.mark.rare  # thirty layers are converted
def test_it_fits_a_target_of_its_shape():
    target = a_target_of_its_shape()
    head = LoadedParallel.read(SHIPPED / "parallel" / "smollm2", tree_program(target, options=EAGER))
    assert head.slots.depth == 4
    plain = treespec.generate(target, torch.tensor([PROMPT]), max_new_tokens=6, options=EAGER)
    drafted = treespec.generate(
        target, torch.tensor([PROMPT]), draft="parallel:smollm2", policy="2,2,1,1", max_new_tokens=6, options=EAGER
    )
    assert torch.equal(drafted.sequences, plain.sequences)


@pytest.mark.rare  # as nothing is downloaded in CI
def test_it_guesses_what_smollm2_says():
    if "SMOLLM2" not in os.environ:
        pytest.skip("SMOLLM2 names no file of SmolLM2's weights")
    found = load("smollm2")
    ids = found.tokenizer.encode(
        "<|im_start|>user\nExplain in a few sentences how rain forms.<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = treespec.generate(
        found.model, torch.tensor([ids]), draft="parallel:smollm2", policy="2,2,1,1", max_new_tokens=48
    )
    plain = treespec.generate(found.model, torch.tensor([ids]), max_new_tokens=48)
    assert torch.equal(answer.sequences, plain.sequences)
    assert answer.stats.tokens_per_step > 1.3
