"""The target's own continuations of training text, with its distribution at every position of them.

A draft is asked to predict what the target writes, which is not what the library's authors wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True)
class Continuation:
    """Rows of one prompt length P with G generated tokens."""

    tokens: Tensor  # int64 [B, P + G]
    logits: Tensor  # bf16 [B, G, V]: the target's, for the generated tokens

    def rows(self, count: int) -> Iterator[Continuation]:
        for tokens, logits in zip(self.tokens.split(count), self.logits.split(count), strict=True):
            yield Continuation(tokens, logits)


class BatchDecoder:
    """Decodes many rows of equal length with preallocated K/V; reads the Llama modules of the target directly."""

    def __init__(self, model: LlamaForCausalLM, rows: int, capacity: int) -> None:
        self.model = model
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = (rows, self.kv_heads, capacity, config.head_dim)
        like = model.lm_head.weight
        self.cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.model.layers]
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        """[B, T] after `length` cached tokens -> logits of the last one [B, V]"""
        body = self.model.model
        batch, count = tokens.shape
        start, end = self.length, self.length + count
        hidden = body.embed_tokens(tokens)
        positions = torch.arange(start, end, device=tokens.device)[None]
        cos, sin = body.rotary_emb(hidden, positions)
        for layer, (keys, values) in zip(body.layers, self.cache, strict=True):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            q, k, v = (
                project(x).view(batch, count, -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            out = self._attend(q * attention.scaling, keys[:, :, :end], values[:, :, :end], start)
            hidden = hidden + attention.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length = end
        return self.model.lm_head(body.norm(hidden[:, -1]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """q [B, Hq, T, D], k and v [B, Hkv, start+T, D] -> [B, T, Hq*D]"""
        batch, _, count, dim = q.shape
        grouped = q.reshape(batch, self.kv_heads, -1, dim)  # [B, Hkv, G*T, D]
        scores = grouped @ k.mT
        if count > 1:
            assert start == 0
            future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.view(batch, -1, count, count).masked_fill(future, float("-inf")).view_as(scores)
        out = scores.softmax(-1) @ v
        return out.view(batch, self.heads, count, dim).transpose(1, 2).reshape(batch, count, -1)


@torch.no_grad()
def continuations(
    model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, sampled_share: float, generator: torch.Generator
) -> Continuation:
    """[B, P] -> Continuation; the last `sampled_share` of the rows is sampled, the others are greedy."""
    batch, length = prompts.shape
    decoder = BatchDecoder(model, batch, length + new_tokens)
    greedy_rows = batch - round(batch * sampled_share)
    tokens, seen = [prompts], []
    step_input = prompts
    for _ in range(new_tokens):
        logits = decoder.step(step_input)
        following = logits.argmax(-1)
        probs = logits[greedy_rows:].float().softmax(-1)
        following[greedy_rows:] = torch.multinomial(probs, 1, generator=generator)[:, 0] if len(probs) else 0
        step_input = following[:, None]
        tokens.append(step_input)
        seen.append(logits)
    return Continuation(torch.cat(tokens, 1), torch.stack(seen, 1))
