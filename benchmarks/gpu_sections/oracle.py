"""The path oracle on the device: every row of a verified tree is what the eager model says after that path."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import treespec_compiler as treespec

from . import llama
from .base import Context, reason

TOLERANCE = 1e-4  # of the largest |logit|, float32
PROMPT, NODES, ROUNDS = 7, 11, 3
MODELS = (
    "llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox",
    "phi3", "falcon", "starcoder2", "olmo2", "gemma", "plain llama",
)  # fmt: skip
COMPILED = ("llama", "gemma")  # by Inductor as well; the others run op by op, since each compilation takes seconds


def run(context: Context, part: str = "0", parts: str = "1") -> None:
    """Every `parts`-th model, from number `part` on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for name in names(context)[int(part) :: int(parts)]:
        for lowering in ("eager", "inductor") if name in COMPILED and not context.smoke else ("eager",):
            if context.left() < 8:
                context.skipped(f"{name}, {lowering}", "no time left")
                continue
            try:
                found = check(context, name, lowering)
            except Exception as error:
                found = {"ok": False, "error": reason(error)}
            context.row("models", name=name, lowering=lowering, **found)


def names(context: Context) -> tuple[str, ...]:
    try:
        import transformers  # noqa: F401

        sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
        import zoo  # noqa: F401
    except ImportError as error:
        context.skipped("models of transformers", str(error))
        return ("plain llama",)
    return context.pick(MODELS, ("llama", "plain llama"))


def model_of(context: Context, name: str) -> nn.Module:
    if name == "plain llama":
        return llama.make("tiny", context.device, torch.float32)
    import zoo

    return zoo.make(name).to(context.device)


def check(context: Context, name: str, lowering: str) -> dict[str, Any]:
    model = model_of(context, name)
    program = treespec.tree_program(model, options={"lowering": lowering})
    vocab, worst = program.vocab_size, 0.0
    cache = program.new_cache(max_tokens=PROMPT + (ROUNDS + 1) * NODES, slots=2)
    prefix = [(5 * i + 3) % vocab for i in range(PROMPT)]
    program.prefill(prefix, cache, slot=1)
    for step in range(ROUNDS):
        tree = random_tree(vocab, step)
        rows = program.verify(treespec.Forest([(1, tree)]), cache)
        for node in range(len(tree)):
            expected = eager_row(model, [*prefix, *tree.path_tokens(node)])
            error = (rows[node] - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(error)) if not error.isnan() else float("nan")
        path = tree.path(random.Random(step).randrange(len(tree)))
        cache.commit({1: path})
        prefix += [tree.tokens[i] for i in path]
    stats = program.graph_stats
    graphs = {"replays": stats.replays, "graphs_off": stats.off}
    return {"ok": bool(worst <= TOLERANCE), "error": worst, "tolerance": TOLERANCE, **graphs}


def random_tree(vocab: int, seed: int) -> treespec.TokenTree:
    chance = random.Random(seed)
    parents = [-1, *(chance.randrange(i) for i in range(1, NODES))]
    return treespec.TokenTree([chance.randrange(vocab) for _ in parents], parents)


def eager_row(model: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out: Any = model(torch.tensor([ids], device=next(model.parameters()).device))
    return getattr(out, "logits", out)[0, -1]
