"""The shipped pair from prompt to last token: treespec with a draft, without one, and what transformers does."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import treespec_compiler as treespec
from treespec_compiler import demo

from .base import Context, reason

POLICIES = ("auto", "2,1,1", "best-first:8")


def run(context: Context) -> None:
    try:
        from treespec_compiler.cli.baselines import HuggingFaceGenerate
        from treespec_compiler.cli.models import load

        target, draft = (load("demo", role=role).model.to(context.device) for role in ("target", "draft"))
        tokenizer = load("demo").tokenizer
    except Exception as error:  # transformers missing, or too old for the folder
        context.skipped("the demo pair", reason(error))
        return
    new = context.pick(128, 6)
    texts = [item.text for item in demo.heldout_prompts()][: context.pick(6, 1)]
    prompts = [torch.tensor([tokenizer.encode(text)], device=context.device) for text in texts]
    options = {"lowering": context.pick("inductor", "eager")}
    settings: dict[str, dict[str, Any]] = {"no draft": {}}
    settings |= {f"draft, {p}": {"draft": draft, "policy": p} for p in context.pick(POLICIES, POLICIES[1:2])}
    ids: dict[str, list[list[int]]] = {}
    plain = HuggingFaceGenerate(target)
    plain(prompts[0], new)
    took, ids["Hugging Face generate"] = [], []
    for prompt in prompts:
        out, seconds = plain(prompt, new)
        took.append(seconds)
        ids["Hugging Face generate"].append(out)
    context.row("loops", name="Hugging Face generate", tokens_per_second=new / statistics.median(took))
    for name, setting in settings.items():
        if context.left() < 8:
            context.skipped(name, "no time left")
            continue
        rates, per_step = [], []
        # All prompts twice: by then every size of step is compiled, recorded and priced.
        for warm in (True, False):
            ids[name] = []
            for prompt in prompts:
                context.synchronize()
                began = time.perf_counter()
                out = treespec.generate(target, prompt, max_new_tokens=new, eos_token_id=(), options=options, **setting)
                ids[name].append(out.sequences[0, prompt.shape[1] :].tolist())
                if not warm:
                    rates.append(new / (time.perf_counter() - began - out.stats.compile_seconds))
                    per_step.append(out.stats.tokens_per_step)
        context.row(
            "loops", name=name, tokens_per_second=statistics.median(rates), tokens_per_step=statistics.mean(per_step),
            identical=ids[name] == ids["Hugging Face generate"],
        )  # fmt: skip
