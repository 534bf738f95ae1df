"""Decoding without speculation, to compare with: what Hugging Face does, and the fastest loop that is easily built."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor


class HuggingFaceGenerate:
    """`model.generate`, greedy, with its default cache; `assistant` makes it assisted generation."""

    name = "Hugging Face generate"

    def __init__(self, model: Any, assistant: Any = None) -> None:
        self.model = model
        self.extra = {} if assistant is None else {"assistant_model": assistant}

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """New ids of a prompt [1, S] and the seconds they took; ends are ignored."""
        began = perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                eos_token_id=self.model.config.vocab_size,  # an id no model gives
                do_sample=False,
                pad_token_id=0,
                **self.extra,
            )
        return out[0, prompt.shape[1] :].tolist(), perf_counter() - began


class StaticCacheLoop:
    """One token a call through the compiled model: static cache, and weights packed by Inductor's freezing.

    The prompt runs op by op, as `generate` runs it; the shapes of the compiled call never change.
    """

    name = "compiled static-cache loop"

    def __init__(self, model: Any, max_tokens: int, inductor_options: dict[str, Any] | None = None) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        self.options = {"freezing": True} | (inductor_options or {})
        self.decode = torch.compile(self._decode, dynamic=False, fullgraph=True, options=self.options)

    def _decode(self, token: Tensor, position: Tensor) -> Tensor:
        out = self.model(token, position_ids=position, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """New ids of a prompt [1, S] and the seconds they took; ends are ignored."""
        began = perf_counter()
        # NOTE: freezing needs no_grad; tensors made in inference mode would be guarded against by the compiled call.
        with torch.no_grad():
            for layer in self.cache.layers:
                layer.cumulative_length.zero_()  # what lies behind the length is masked
            out = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            ids = [int(token)]
            position = torch.tensor([[prompt.shape[1]]])
            while len(ids) < new_tokens:
                token = self.decode(token, position)
                ids.append(int(token))
                position += 1
        return ids, perf_counter() - began
