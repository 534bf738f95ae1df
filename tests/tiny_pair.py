"""A pair of tiny Llamas in folders, as Hugging Face saves them, with a tokenizer of characters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

PROMPT = "def main():\n    return "


def character_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *characters])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_llama(folder: Path, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def saved_pair(folder: Path) -> SimpleNamespace:
    """Names of both for the command line, and what the target gives after `PROMPT`."""
    save_llama(folder / "target", layers=2, seed=1)
    save_llama(folder / "draft", layers=1, seed=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "target")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "target")
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    return SimpleNamespace(
        target=f"hf:{folder / 'target'}",
        draft=f"hf:{folder / 'draft'}",
        folder=folder,
        expected=expected,
        text=tokenizer.decode(expected),
    )
