"""The decoding loops that are compared: plain ones of every kind, Hugging Face's own, and treespec."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
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
        return {"name": self.name, "kind": self.kind, "settings": self.settings}


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


def plain_treespec_loop(target: Any, options: dict[str, Any]) -> Loop:
    """treespec's program without a draft: the same kernels, one token a step."""
    return Loop("treespec without a draft", "plain", _generate(target, None, None, options), {"options": options})


def treespec_loop(target: Any, draft: Any, spec: str, options: dict[str, Any], note: str = "") -> Loop:
    """What `spec` names: a policy as `generate` takes it, and `+ngram` for prompt lookup beside the model."""
    policy, _, added = spec.partition("+")
    if added not in ("", "ngram"):
        raise SystemExit(f"got {spec!r}, expected a policy such as 1,1,3 or auto, and after it nothing or +ngram")
    drafts = [draft, "ngram"] if added else draft
    settings = {"spec": spec, "expansion": expansion(policy) if not added else None, "options": options}
    return Loop(f"treespec {spec}{note}", "treespec", _generate(target, drafts, policy, options), settings)


def expansion(policy: str) -> list[int] | None:
    """The widths of a policy whose trees have one shape; None for others."""
    if chain := re.fullmatch(r"chain:(\d+)", policy):
        return [1] * int(chain[1])
    return [int(k) for k in policy.split(",")] if re.fullmatch(r"\d+(,\d+)*", policy) else None


def _generate(target: Any, draft: Any, policy: str | None, options: dict[str, Any]) -> Callable[[Tensor, int], Run]:
    def run(prompt: Tensor, new_tokens: int) -> Run:
        began = perf_counter()
        out = treespec.generate(
            target, prompt, draft=draft, max_new_tokens=new_tokens, policy=policy, eos_token_id=(), options=options
        )
        seconds = perf_counter() - began
        stats = out.stats
        prefill = stats.prefill_seconds + stats.draft_prefill_seconds
        return Run(out.sequences[0, prompt.shape[1] :].tolist(), seconds, prefill, stats.as_dict())

    return run


def _timed(loop: HuggingFaceGenerate) -> Callable[[Tensor, int], Run]:
    def run(prompt: Tensor, new_tokens: int) -> Run:
        return Run(*loop(prompt, new_tokens))

    return run
