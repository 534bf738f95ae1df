"""Running a reproducer folder again, and bisecting it: which pass first changes what the graph means."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InvalidOption, InvalidPipeline, PassError
from ..options import Options
from ..passes.framework.found import built_in
from ..passes.framework.manager import Instrument, Pass, run_passes
from ..passes.framework.registry import registered_passes
from ..passes.framework.reproducer import GRAPH, INFO, WEIGHTS
from ..passes.framework.state import GraphState
from ..passes.show.restore import restore
from ..passes.show.snapshot import Snapshot
from ..pipeline import check_level
from ..program.semantics import Reference, path_check, run_graph
from ..tree import TokenTree


@dataclass
class Failure:
    """A reproducer folder, read."""

    folder: Path
    info: dict[str, Any]
    graph: Snapshot
    tensors: dict[str, Tensor]
    options: Options
    passes: list[Pass]

    def fresh(self) -> GraphState:
        """The captured graph, untouched."""
        return restore(self.graph, self.tensors)

    def reference(self) -> Reference:
        """Logits of the captured graph itself, which stands for the model."""
        captured = self.fresh()
        captured.clean()
        return lambda ids: run_graph(captured, TokenTree.chain(ids), [])

    @property
    def meaning_checked(self) -> bool:
        return self.options.verify_each == "semantic" or bool(self.info["user_passes"])


def read(folder: Path, run_saved_passes: bool = False) -> Failure:
    """Read a folder; passes of the user's that are not registered here are loaded from it only when asked to."""
    try:
        info = json.loads((folder / INFO).read_text())
        graph = Snapshot.from_json(json.loads((folder / GRAPH).read_text()))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidOption(
            name="DIR",
            got=str(folder),
            expected="a folder that a failed conversion wrote",
            fix=f"It has no usable {error}.",
        ) from error
    generator = torch.Generator().manual_seed(0)
    for name, (dtype, *shape) in info["random_weights"].items():
        random = torch.randn(shape, generator=generator) / max(1, shape[-1] if shape else 1) ** 0.5
        tensors[name] = random.to(getattr(torch, dtype))
    known = {f.name for f in fields(Options)}
    options = Options(**{k: v for k, v in info["options"].items() if k in known})
    return Failure(folder, info, graph, tensors, options, _passes(folder, info, run_saved_passes))


def _passes(folder: Path, info: dict[str, Any], run_saved_passes: bool) -> list[Pass]:
    known = {p.slug: p for p in built_in()} | registered_passes()
    for name in info["user_passes"]:
        if name in known:
            continue
        source = folder / f"pass-{name}.py"
        if not run_saved_passes:
            raise InvalidPipeline(
                got=f"the pass {name!r}, which is not registered here",
                expected="a registered pass",
                fix=f"Import the module that registers it, or run its copy {source} with --run-saved-passes.",
            )
        spec = importlib.util.spec_from_file_location(f"treespec_saved_{name.replace('-', '_')}", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        known |= registered_passes()
    missing = [n for n in info["pipeline"] if n not in known]
    if missing:
        raise InvalidPipeline(got=f"no pass {missing[0]!r}", expected=f"one of {', '.join(known)}")
    return [known[n] for n in info["pipeline"]]


def run_again(failure: Failure, instruments: list[Instrument] | None = None) -> Exception | None:
    """The error of the recorded pipeline on the recorded graph, or None when it passes now."""
    meaning = [path_check(failure.reference())] if failure.meaning_checked else []
    levels = [] if failure.options.verify_each == "none" else [check_level]
    always = meaning if failure.options.verify_each == "semantic" else []
    try:
        run_passes(failure.fresh(), failure.passes, [*levels, *always], meaning, instruments or [])
    except Exception as error:
        return error
    return None


@dataclass(frozen=True)
class Culprit:
    """The first pass after which the graph means something else, or that raises."""

    name: str
    index: int
    error: Exception
    looked_at: int  # how many prefixes of the pipeline were run


def bisect(failure: Failure, tell: Callable[[str], None] = lambda _: None) -> Culprit | None:
    """Binary search over prefixes of the pipeline; a graph that lost its meaning is taken to stay without it."""
    check = path_check(failure.reference())
    errors: dict[int, Exception] = {}

    def broken(count: int) -> bool:
        """Whether the first `count` passes lose the meaning."""
        state = failure.fresh()
        try:
            run_passes(state, failure.passes[:count])
            state.clean()
            check(state, failure.passes[count - 1].name if count else "capture")
        except Exception as error:
            if isinstance(error, PassError):
                error.user = failure.passes[count - 1].user
            errors[count] = error
        tell(f"{count:>2} passes: {'wrong' if count in errors else 'right'}")
        return count in errors

    low, high = 0, len(failure.passes)
    if not broken(high):
        return None
    looked = 1
    while high - low > 1:
        middle = (low + high) // 2
        looked += 1
        low, high = (low, middle) if broken(middle) else (middle, high)
    return Culprit(failure.passes[high - 1].slug, high, errors[high], looked)


def same_failure(failure: Failure, error: Exception | None) -> bool:
    """Whether the error is the recorded one: its class, and for a pass's broken promise the pass."""
    if error is None or type(error).__name__ != failure.info["error"]:
        return False
    return not isinstance(error, PassError) or error.pass_name.replace(" ", "-") == failure.info["failing_pass"]
