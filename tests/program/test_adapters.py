"""Kinds of PEFT's adapters, each through its switches: what the program says is what the model says, each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import Tiny
from oracles import EAGER, TOLERANCE, error
from torch import Tensor, nn
from zoo import spread

import treespec_compiler as treespec

peft = pytest.importorskip("peft")

IDS, BEHIND = [5, 17, 3, 9, 4], [1, 3]
OPTIONS = EAGER | {"verify": "off"}  # it is compared here
LINEAR = {"target_modules": ["qkv.0", "out.0"]}

KINDS: dict[str, Callable[[], Any]] = {
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, **LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **LINEAR),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["out.0"]),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["norms.0"]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, **LINEAR),
    "HRA": lambda: peft.HRAConfig(r=4, apply_GS=True, **LINEAR),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, topk=2, **LINEAR),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5, 17], target_modules=["embed"]),
}


class Base(Tiny):
    layers = 1


def _shaken(model: Any) -> None:
    """The weights of the adapter that is on become others: most kinds begin as one that changes nothing."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def _said(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    return getattr(out, "logits", out)[0, -1]


def _same(model: Any) -> Tensor:
    """What the model says; the program says the same of a prompt, and of a node of a tree behind it."""
    program = treespec.tree_program(model, options=OPTIONS)
    cache = program.new_cache(len(IDS) + 3)
    said = _said(model, IDS)
    assert error(program.prefill(IDS, cache), said) <= TOLERANCE
    rows = program.verify(treespec.TokenTree([BEHIND[0], 2, BEHIND[1]], [-1, -1, 0]), cache)
    assert error(rows[2], _said(model, IDS + BEHIND)) <= TOLERANCE
    return said


def _apart(a: Tensor, b: Tensor) -> bool:
    return error(a, b) > 10 * TOLERANCE


def _switched(model: Any, config: Any) -> Tensor:
    """On, off, and another adapter in the first one's place; what the first one says, which is on again."""
    _shaken(model)
    first = _same(model)
    with model.disable_adapter():
        plain = _same(model)
    model.add_adapter("second", config)
    model.set_adapter("second")
    _shaken(model)
    second = _same(model)
    assert _apart(plain, first) and _apart(second, first) and _apart(second, plain)
    model.set_adapter("default")
    return first


@pytest.mark.family
@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_each_switch(kind: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(spread(Base()), KINDS[kind]())
    first = _switched(model, KINDS[kind]())
    model.merge_adapter()
    assert not _apart(_same(model), first)


@pytest.mark.rare
def test_prompts_of_layers() -> None:
    """Keys and values that each layer sees in front of the text; they cannot be merged."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    base: nn.Module = transformers.LlamaForCausalLM(config).eval()
    adapter = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(spread(base), adapter)
    first = _switched(model, adapter)
    assert not _apart(_same(model), first)
