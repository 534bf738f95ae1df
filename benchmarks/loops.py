"""The decoding loops that are compared: plain ones of every kind, Hugging Face's own, and treespec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal

from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.cli.baselines import HuggingFaceGenerate, StaticCacheLoop

Kind = Literal["generate", "assisted", "plain", "treespec"]


@dataclass
class Run:
    """One prompt's continuation."""

    ids: list[int]
    seconds: float
    """From the prompt to the last id."""
    prefill_seconds: float | None = None
    """Of them, spent on running the prompt (by the draft too); None where the loop does not say."""
    stats: dict[str, Any] | None = None


@dataclass
class Loop:
    name: str
    kind: Kind
    run: Callable[[Tensor, int], Run]
    """(prompt [1, S], new tokens) -> what came out."""
    settings: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        described = asdict(self)
        del described["run"]
        return described


@dataclass(frozen=True)
class StaticVariant:
    """A way to compile the one-token call over Hugging Face's static cache."""

    name: str
    settings: dict[str, Any]
    rows: int = 1

    def build(self, model: Any, max_tokens: int) -> StaticCacheLoop:
        return StaticCacheLoop(model, max_tokens, self.settings, self.rows)


_AUTOTUNE = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "autotune_num_choices_displayed": 0}
# What treespec itself sets: Inductor's own loops on one thread (ATen keeps its threads), no Python in the call.
_LEAN = {"cpp.threads": 1, "cpp_wrapper": True}
STATIC: dict[str, StaticVariant] = {
    "plain": StaticVariant("static cache, compiled", {"freezing": False}),
    "frozen": StaticVariant("static cache, frozen", {}),
    "lean": StaticVariant("static cache, frozen, lean", _LEAN),
    "lean2": StaticVariant("static cache, frozen, lean, 2 rows", _LEAN, 2),
    "autotune": StaticVariant("static cache, max-autotune", _AUTOTUNE),
    "autotune2": StaticVariant("static cache, max-autotune, 2 rows", _AUTOTUNE, 2),
    "autotune4": StaticVariant("static cache, max-autotune, 4 rows", _AUTOTUNE, 4),
}

# Hugging Face's defaults, and a chain as long as treespec's. Both are run; the better one is the one compared with.
ASSISTED: dict[str, dict[str, Any]] = {
    "Hugging Face assisted": {
        "num_assistant_tokens": 20,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.4,
    },
    "Hugging Face assisted, 5 tokens": {
        "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    },
}


def generate_loop(target: Any) -> Loop:
    return Loop(HuggingFaceGenerate.name, "generate", _timed(HuggingFaceGenerate(target)))


def assisted_loops(target: Any, draft: Any) -> list[Loop]:
    return [
        Loop(name, "assisted", _timed(HuggingFaceGenerate(target, draft, settings)), settings)
        for name, settings in ASSISTED.items()
    ]


def static_loop(target: Any, max_tokens: int, variant: StaticVariant) -> Loop:
    loop = variant.build(target, max_tokens)

    def run(prompt: Tensor, new_tokens: int) -> Run:
        ids, seconds = loop(prompt, new_tokens)
        return Run(ids, seconds, loop.prefill_seconds)

    return Loop(variant.name, "plain", run, {"inductor": loop.settings, "rows": loop.rows})


def treespec_loop(target: Any, draft: Any, expansion: Sequence[int], options: dict[str, Any], note: str = "") -> Loop:
    """treespec with a draft and an expansion; without a draft it decodes plainly, with the same kernels."""
    policy = treespec.StaticExpansion(tuple(expansion)) if draft is not None else None

    def run(prompt: Tensor, new_tokens: int) -> Run:
        began = perf_counter()
        out = treespec.generate(
            target, prompt, draft=draft, max_new_tokens=new_tokens, policy=policy, eos_token_id=(), options=options
        )
        seconds = perf_counter() - began
        stats = out.stats
        prefill = stats.prefill_seconds + stats.draft_prefill_seconds
        return Run(out.sequences[0, prompt.shape[1] :].tolist(), seconds, prefill, stats.as_dict())

    if policy is None:
        return Loop("treespec without a draft", "plain", run, {"options": options})
    settings = {"expansion": list(policy.expansion), "nodes": policy.max_nodes, "options": options}
    return Loop(f"treespec {policy}{note}", "treespec", run, settings)


def _timed(loop: HuggingFaceGenerate) -> Callable[[Tensor, int], Run]:
    def run(prompt: Tensor, new_tokens: int) -> Run:
        return Run(*loop(prompt, new_tokens))

    return run
