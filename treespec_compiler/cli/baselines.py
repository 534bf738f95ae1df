"""Decoding without speculation, to compare with: what Hugging Face does, and the fastest loop that is easily built."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


class HuggingFaceGenerate:
    """`model.generate`, greedy, with its default cache; `assistant` makes it assisted generation."""

    name = "Hugging Face generate"

    def __init__(self, model: Any, assistant: Any = None, assistant_settings: Mapping[str, Any] | None = None) -> None:
        self.model, self.assistant = model, assistant
        self.assistant_settings = dict(assistant_settings or {})
        self.extra = {} if assistant is None else {"assistant_model": assistant}

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """New ids of a prompt [1, S] and the seconds they took; ends are ignored."""
        for name, value in self.assistant_settings.items():
            setattr(self.assistant.generation_config, name, value)  # generate() changes them as it goes
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

    The prompt runs op by op, as `generate` runs it; the shapes of the compiled call never change. `settings` are
    Inductor's. With `rows` > 1 a call has that many tokens, of which the first one counts: kernels for a few rows can
    be faster than those for one.
    """

    name = "compiled static-cache loop"

    def __init__(self, model: Any, max_tokens: int, settings: Mapping[str, Any] | None = None, rows: int = 1) -> None:
        from transformers import StaticCache

        self.model, self.rows = model, rows
        self.cache = StaticCache(config=model.config, max_cache_len=max_tokens + rows - 1)
        self.settings = {"freezing": True} | dict(settings or {})
        self.prefill_seconds = 0.0
        self.compile_seconds = 0.0
        self._compiled = False
        # Its own code object: compiled code is looked up by it, and loops that share it are compiled 8 times at most.
        code = StaticCacheLoop._decode.__code__.replace()
        own = FunctionType(code, globals(), "decode")
        self._call = torch.compile(own, dynamic=False, fullgraph=True)

    def _decode(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True).logits
        if self.rows > 1:
            for layer in self.cache.layers:
                layer.cumulative_length.sub_(self.rows - 1)
        return logits.argmax(-1)  # [1, rows]

    def decode(self, tokens: Tensor) -> Tensor:
        """The tokens after `tokens` [1, rows], of which the first one is kept in the cache."""
        return self._call(self, tokens)

    def prefill(self, prompt: Tensor) -> Tensor:
        """Run a prompt [1, S] op by op; the next token, `rows` times."""
        if not self._compiled:
            self._compile(prompt)
        self.rewind(0)
        return self._prefill(prompt)

    def _prefill(self, prompt: Tensor) -> Tensor:
        out = self.model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True).repeat(1, self.rows)

    def rewind(self, length: int) -> None:
        """Keep the first tokens only; what lies behind them is masked."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def _compile(self, prompt: Tensor) -> None:
        from torch._inductor import config

        began = perf_counter()
        # NOTE: `torch.compile(options=...)` is too late for freezing: Dynamo itself asks whether weights are constants.
        with config.patch(self.settings):
            self.decode(self._prefill(prompt))
        self._compiled = True
        self.compile_seconds = perf_counter() - began

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """New ids of a prompt [1, S] and the seconds they took; ends are ignored, compilation is not counted."""
        # NOTE: freezing needs no_grad; tensors made in inference mode would be guarded against by the compiled call.
        with torch.no_grad():
            if not self._compiled:
                self._compile(prompt)
            began = perf_counter()
            token = self.prefill(prompt)
            ids = [int(token[0, 0])]
            self.prefill_seconds = perf_counter() - began
            while len(ids) < new_tokens:
                token = self.decode(token)
                ids.append(int(token[0, 0]))
            return ids, perf_counter() - began
