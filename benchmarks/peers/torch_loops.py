"""Hugging Face's generate and treespec: workers of bench_cpu_peers.py.

python torch_loops.py huggingface MODEL THREADS CONTEXT
python torch_loops.py treespec MODEL THREADS CONTEXT STORAGE         # one of option `weights`
"""

from __future__ import annotations

import sys
from statistics import median
from time import perf_counter
from typing import Any

from protocol import Answer, serve

LOOKUP = {"prompt_lookup_num_tokens": 10}
"""Hugging Face's prompt lookup, as its documentation sets it."""
ROWS = (1, 4, 8, 16)
ROUNDS = 15


class _Times:
    """When tokens came, as a streamer is told. The prompt is told first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(perf_counter())

    def end(self) -> None:
        pass


def hugging_face(name: str, threads: int) -> tuple[dict[str, Any], Answer]:
    import torch
    import transformers

    from treespec_compiler.cli.models import load

    torch.set_num_threads(threads)
    model = load(name).model

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompt, times = torch.tensor([request["ids"]]), _Times()
        began = perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["new"],
            eos_token_id=model.config.vocab_size,  # an id that no model gives
            pad_token_id=0,
            do_sample=False,
            streamer=times,
            **(LOOKUP if request["lookup"] else {}),
        )
        seconds = perf_counter() - began
        return {"ids": out[0, prompt.shape[1] :].tolist(), "seconds": seconds, "first": times.at[1] - began}

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"bytes": size, "version": transformers.__version__}, answer


def treespec_loop(name: str, threads: int, context: int, storage: str) -> tuple[dict[str, Any], Answer]:
    import torch

    import treespec_compiler as treespec
    from treespec_compiler.cli.models import load

    torch.set_num_threads(threads)
    model, options = load(name).model, {"weights": storage}
    program = treespec.tree_program(model, options=options)

    def steps() -> dict[str, Any]:
        """Milliseconds of a chain of so many rows after 128 tokens, the median of many, in turn."""
        cache = program.new_cache(256)
        program.prefill([7] * 128, cache)
        trees = {rows: treespec.TokenTree.chain([7] * rows) for rows in ROWS}
        took: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for _ in range(ROUNDS):
            for rows, tree in trees.items():
                for count in range(4):
                    began = perf_counter()
                    program.verify(tree, cache)
                    if count:
                        took[rows].append(perf_counter() - began)
        return {"steps": {rows: 1000 * median(each) for rows, each in took.items()}}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "steps" in request:
            return steps()
        prompt, draft = torch.tensor([request["ids"]]), "ngram" if request["lookup"] else None
        began = perf_counter()
        out = treespec.generate(
            model, prompt, draft=draft, max_new_tokens=request["new"], eos_token_id=(), options=options
        )
        seconds = perf_counter() - began - out.stats.compile_seconds
        first = out.stats.prefill_seconds + out.stats.draft_prefill_seconds
        return {"ids": out.sequences[0, prompt.shape[1] :].tolist(), "seconds": seconds, "first": first}

    forms = dict(program.packed_bytes.forms)
    return {"bytes": int(program.packed_bytes), "forms": forms, "version": treespec.__version__}, answer


if __name__ == "__main__":
    kind, model_name, threads, context, *more = sys.argv[1:]
    if kind == "huggingface":
        serve(lambda: hugging_face(model_name, int(threads)))
    else:
        serve(lambda: treespec_loop(model_name, int(threads), int(context), more[0]))
