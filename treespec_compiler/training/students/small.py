"""A small model of transformers that learns the target's distribution (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidOption, MissingPackage
from ...user_cache import write_whole
from ..acceptance import shifted
from ..losses import cross_entropy
from ..texts import WrittenText


@dataclass(frozen=True)
class SmallPlan:
    """Of a Llama, where no model is given to begin with."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    depth: int = 5
    """Places behind the root that acceptance is measured at."""


def small_model(plan: SmallPlan, vocab: int, context: int, seed: int) -> nn.Module:
    """A Llama with weights drawn by `seed`. Raises MissingPackage, InvalidOption."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        fix = 'Install it: pip install "treespec[hf]".'
        raise MissingPackage(package="transformers", purpose="a small model to train", fix=fix) from error
    if plan.hidden % (2 * plan.heads):
        got = f"{plan.heads} heads for a width of {plan.hidden}"
        raise InvalidOption(name="heads", got=got, expected="heads of an even width")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads // 2 if plan.heads % 2 == 0 else plan.heads,
        intermediate_size=3 * plan.hidden,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


class SmallStudent:
    """A causal model of transformers that learns."""

    def __init__(self, model: Any, device: torch.device, depth: int, tokenizer: Any = None) -> None:
        """`tokenizer` is saved beside it."""
        self._model = model.to(device, torch.float32).train()
        for module in self._model.modules():
            if isinstance(module, nn.Dropout):  # chance would have to be kept over an interruption
                module.p = 0.0
        self._depth, self._tokenizer = depth, tokenizer
        self._vocab = int(self._model.get_input_embeddings().weight.shape[0])
        self.weights = dict(self._model.named_parameters())
        for weight in self.weights.values():
            weight.requires_grad_()

    def _logits(self, text: WrittenText) -> Tensor:
        """[R, V], behind the root and each token after it."""
        known = text.tokens[:-1].clamp(max=self._vocab - 1)
        logits: Tensor = self._model(input_ids=known[None], use_cache=False).logits[0]
        return logits[text.prompt :]

    def loss(self, text: WrittenText) -> Tensor:
        ids = text.ids.masked_fill(text.ids >= self._vocab, -1)
        each = cross_entropy(self._logits(text), ids, text.log_probabilities)
        return (each if text.counts is None else each * text.counts).sum()

    @torch.no_grad()
    def hits(self, text: WrittenText) -> Tensor:
        return shifted(self._logits(text).argmax(1) == text.ids[:, 0], self._depth).cpu()

    def bytes_of(self, tokens: int) -> int:
        config = self._model.config
        hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
        attention = 12 * int(config.num_attention_heads) * tokens * tokens
        wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
        return 4 * 4 * tokens * self._vocab + layers * (attention + 4 * tokens * (20 * hidden + 6 * wide))

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """As transformers saves it."""
        from copy import deepcopy

        saved = deepcopy(self._model).to(torch.bfloat16).eval()
        saved.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        write_whole(folder / "training.json", json.dumps(about, indent=1) + "\n")
