"""One model type of the zoo: convert it and compare every row with the eager model. Runs in a process of its own."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .foreign import foreign_model, known
from .models import CLASS_OF, VARIANTS, VOCAB, has_window, tiny_config, tiny_model
from .plans import against_plan

if TYPE_CHECKING:
    from ...passes.framework.state import GraphState

TOLERANCE = 1e-4
NODES = 11
ROUNDS = 3

# A window shorter than the traced prompt, and one longer (with a prefix that outgrows it).
SHORT, LONG = 4, 24


@dataclass
class Result:
    """What became of one type. `verdict`: exact, refused, wrong (a bug) or error (of transformers, or a bug)."""

    type: str
    cls: str
    verdict: str = "error"
    error: float | None = None
    """Worst difference to the eager logits, relative to their largest magnitude."""
    packing: float | None = None
    """Worst difference of a forest over slots to each slot alone, relative likewise."""
    sites: int | None = None
    masks: list[str] = field(default_factory=list)
    reason: str | None = None
    node: str | None = None
    source: str | None = None
    layer: str | None = None
    module: str | None = None
    """Class of the layer that was refused: for another token mixer than attention, its name."""
    variant: str | None = None
    """The variant that was refused or wrong."""
    variants: list[str] = field(default_factory=list)
    cut: dict[str, Any] | None = None
    """With a mesh: how the model was cut, counts by what they count (`check_cut`)."""
    seconds: float = 0.0


def check_type(model_type: str, experts: str | None = None, mesh: str | None = None) -> Result:
    """Run every variant of a type; the first that is not exact gives the verdict. `experts`: see `tiny_model`.

    With a `mesh`, its plain configuration alone, cut and run on all ranks.
    """
    result = Result(model_type, CLASS_OF.get(model_type, "N"))
    started = time.perf_counter()
    try:
        if model_type in known():
            check_model(foreign_model(model_type), result, prefix=7)
            return result
        for name, fields, window in _variants(model_type)[: 1 if mesh else None]:
            result.variant = name
            model = tiny_model(model_type, window, experts, **fields)
            if mesh is not None:
                check_cut(model, result, mesh)
                continue
            check_model(model, result, prefix=30 if LONG in (window, fields.get("sliding_window")) else 7)
            result.variants.append(name)
            if result.verdict != "exact":
                break
        else:
            result.variant = None
    except Exception as error:
        _record(result, error)
    finally:
        result.seconds = round(time.perf_counter() - started, 1)
    return result


def _variants(model_type: str) -> list[tuple[str, dict[str, Any], int | None]]:
    windows: list[int | None] = [SHORT, LONG] if has_window(tiny_config(model_type)) else [None]
    found: list[tuple[str, dict[str, Any], int | None]] = [(f"window {w}" if w else "default", {}, w) for w in windows]
    return found + [(name, fields, None) for name, fields in VARIANTS.get(model_type, {}).items()]


def _record(result: Result, error: Exception) -> None:
    from ...errors import Unsupported

    if isinstance(error, Unsupported):
        result.verdict, result.reason = "refused", error.reason
        result.node, result.source = error.node, error.source
        result.layer, result.module = error.layer, error.module
    else:
        result.verdict = "error"
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_model(model: nn.Module, result: Result, prefix: int) -> None:
    """The path oracle over three rounds of verify and commit, then a forest of three slots, and each slot alone."""
    from ...program.own_choices import own_choices
    from ...program.semantics import random_tree
    from ...program.tree_program import tree_program
    from ...tree import Forest, TokenTree

    program = tree_program(model, options={"lowering": "eager", "program_cache": False})
    result.sites = len(program.sites)
    result.masks = sorted({*result.masks, *(_mask_text(site) for site in program.sites)})
    worst = result.error or 0.0

    def own_row(model: nn.Module, ids: list[int]) -> torch.Tensor:
        with own_choices(program.state):  # of equal scores, an indexer takes those that decoding takes
            return eager_row(model, ids)

    def compare(rows: Any, committed: list[int], tree: TokenTree) -> float:
        paths = [committed + tree.path_tokens(i) for i in range(len(tree))]
        return max(distance(rows[i], own_row(model, path)) for i, path in enumerate(paths))

    ids = [(7 * i + 5) % VOCAB for i in range(prefix)]
    cache = program.new_cache(max_tokens=96, slots=3)
    worst = max(worst, distance(program.prefill(ids, cache), own_row(model, ids)))
    for seed in range(ROUNDS):
        tree = random_tree(NODES, VOCAB, seed)
        worst = max(worst, compare(program.verify(tree, cache), ids, tree))
        path = tree.path(NODES - 1)
        cache.commit(path)
        ids = ids + [tree.tokens[i] for i in path]
    prefixes = {0: ids, 1: [(11 * i + 3) % VOCAB for i in range(5)], 2: [7]}
    trees = {slot: random_tree(NODES - 4 * slot, VOCAB, 7 + slot) for slot in prefixes}
    for slot in (1, 2):
        program.prefill(prefixes[slot], cache, slot=slot)
    alone = {slot: program.verify(Forest([(slot, tree)]), cache).clone() for slot, tree in trees.items()}
    order = (2, 0, 1)
    rows = program.verify(Forest([(slot, trees[slot]) for slot in order]), cache)
    parts = dict(zip(order, rows.split([len(trees[slot]) for slot in order]), strict=True))
    packing = max(distance(parts[slot][i], row) for slot in order for i, row in enumerate(alone[slot]))
    result.packing = max(result.packing or 0.0, packing)
    worst = max([worst, packing, *(compare(parts[slot], prefixes[slot], trees[slot]) for slot in order)])
    if any(site.index_dim for site in program.sites):
        worst = max(worst, distance(own_row(model, ids), decoded_row(model, ids)))
    result.error = worst
    result.verdict = "exact" if worst <= TOLERANCE else "wrong"
    if result.verdict == "wrong":
        result.reason = f"logits {worst:.1e} of the largest away from the eager model's"


def check_cut(model: nn.Module, result: Result, mesh: str) -> None:
    """The path oracle on all ranks of a mesh, in this process: a round of verify and commit, and one more tree."""
    from ...capture.call import call_spec
    from ...options import Options
    from ...passes.sharding.summary import summary
    from ...pipeline import convert
    from ...program.lockstep import Lockstep
    from ...program.semantics import random_tree

    options, call = Options.parse({"lowering": "eager", "mesh": mesh}), call_spec(model, None, None)
    first = [options.shape.ranks_of(stage)[0] for stage in range(options.shape.pp)]
    states = [convert(model, call, options, rank=rank).state for rank in first]
    found = [summary(state) for state in states]
    held = {w.names: w.whole_bytes for each in found for w in each.weights}  # what several stages hold counts once
    result.sites = sum(each.sites for each in found)
    result.cut = {
        **{kind: sum(each.products[kind] for each in found) for kind in found[0].products},
        "all_reduce": sum(each.count("all_reduce") for each in found),
        "all_gather": sum(each.count("all_gather") for each in found),
        "whole_sites": sum(each.whole_sites for each in found),
        "plan": _plan(model, states),
        "share": round(max(each.bytes for each in found) / sum(held.values()), 3),
    }
    ranks = Lockstep(states, max_tokens=64)
    ids = [(7 * i + 5) % VOCAB for i in range(7)]
    worst = distance(ranks.prefill(ids), eager_row(model, ids))
    for seed in range(2):
        tree = random_tree(NODES - 4, VOCAB, seed)
        rows = ranks.verify(tree)
        paths = [ids + tree.path_tokens(i) for i in range(len(tree))]
        worst = max(worst, *(distance(row, eager_row(model, path)) for row, path in zip(rows, paths, strict=True)))
        path = tree.path(len(tree) - 1)
        ranks.commit(path)
        ids = ids + [tree.tokens[i] for i in path]
    result.error = worst
    result.verdict = "exact" if worst <= TOLERANCE else "wrong"
    if result.verdict == "wrong":
        result.reason = f"logits {worst:.1e} of the largest away from the eager model's"


def _plan(model: nn.Module, states: list[GraphState]) -> dict[str, Any] | None:
    """What transformers' own plan says of the same weights; None where it has none, or layers are not shared."""
    from ...passes.sharding.summary import of_weights

    if states[0].cut is None:
        return None
    found = against_plan(model, {name: kind for state in states for name, kind in of_weights(state).items()})
    return None if found is None else {"agree": found.agree, "differ": [str(d) for d in found.differ]}


def _mask_text(site: Any) -> str:
    return str(getattr(site, "formula", site.mask.formula))


def eager_row(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The model's own next-token logits after `ids`."""
    from ...capture.call import call_spec, run_logits

    with torch.no_grad():
        call = call_spec(model).with_tokens(torch.tensor([ids]))
        return run_logits(model, call.args, call.kwargs)[0, -1]


def decoded_row(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The same, decoded token by token with the model's own cache."""
    cache, row = None, torch.empty(0)
    with torch.no_grad():
        for token in ids:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache, row = out.past_key_values, out.logits[0, -1]
    return row


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest magnitude; infinite where either is not finite."""
    if not bool(torch.isfinite(got).all() and torch.isfinite(expected).all()):
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def send_result(
    model_type: str, memory: int, connection: Connection, experts: str | None = None, mesh: str | None = None
) -> None:
    """The body of the process: limits its address space, keeps quiet, and sends the result."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    connection.send(check_type(model_type, experts, mesh))


# What each process needs: imported once, by the server that the processes are forked from.
PRELOADED = (
    __name__,
    "transformers",
    "torch._dynamo",
    "treespec_compiler.program.tree_program",
    "treespec_compiler.program.semantics",
)
