"""Lowering: a bound graph becomes a callable, by Inductor once for all shapes, or op by op.

The symbols of `ir.inputs` are dynamic, so no length, tree or cache size compiles anything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ..capture.alone import alone
from ..capture.torch_errors import lacks_compiler
from ..errors import MissingCompiler
from ..ir.collectives import ALL_GATHER, ALL_REDUCE
from ..ir.device import profile
from ..ir.inputs import input_of
from ..ir.library import fingerprint
from ..logs import logger
from . import vectors

log = logger(__name__)

# Example sizes, all different: equal sizes would be taken for the same symbol.
EXAMPLE = {
    "T": 13,
    "rows": 7,
    "requests": 3,
    "requests + 1": 4,
    "words": 5,
    "pages": 2,
    "page_size": 17,
    "slot_pages": 6,
    "state_requests": 8,
    "state_nodes": 19,
    "state_slots": 9,
    "stash_rows": 23,
}

_compile_calls = 0


def compile_calls() -> int:
    """How often Inductor was called by treespec in this process."""
    return _compile_calls


@dataclass
class Lowered:
    """`run(inputs)` takes the graph's inputs in placeholder order and returns its outputs, first logits [1, rows, V].

    It may empty the list it is given.
    """

    run: Callable[[list[Tensor]], Sequence[Tensor]]
    seconds: float


def lower_eager(gm: fx.GraphModule) -> Lowered:
    """Run the graph op by op."""

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        return gm(*inputs)

    return Lowered(run, 0.0)


def lower_inductor(gm: fx.GraphModule, names: Sequence[str], examples: Sequence[Tensor]) -> Lowered:
    """Compile with Inductor. `names` are the roles of the inputs, `examples` real tensors of any size."""
    global _compile_calls
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode

    started = time.perf_counter()
    # NOTE a fresh mode and ShapeEnv for every compile: reusing the traced ones silently specialises to their sizes.
    # 0 and 1 are not special: a tree of one node runs on the same code as any other.
    env = ShapeEnv(specialize_zero_one=False, duck_shape=True)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes = [_fake(mode, name, tensor) for name, tensor in zip(names, examples, strict=True)]
    module = fx.GraphModule(gm, _without_values(gm.graph))
    settings = _settings(examples[0].device)
    # NOTE Inductor's caches know a custom op by its name: code compiled for another schema of it would run, and crash.
    shared: Any = torch.compiler.config
    tag = f"{shared.cache_key_tag} treespec {fingerprint()}"
    if any(node.target in (ALL_REDUCE, ALL_GATHER) for node in gm.graph.nodes):
        settings["cpp_wrapper"] = False  # it does not know how to name a group (torch 2.13)
    try:
        with (
            alone(),
            torch.no_grad(),
            config.patch(settings),
            shared.patch(cache_key_tag=tag),
            tracing(TracingContext(mode)),
        ):
            compiled = compile_fx(module, fakes)
    except Exception as error:
        if lacks_compiler(error):
            names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else config.cpp.cxx
            raise MissingCompiler(looked_for=", ".join(name for name in names if name)) from error
        raise
    _compile_calls += 1

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        return compiled(*inputs)

    lowered = Lowered(run, time.perf_counter() - started)
    found = _compiled_graph(compiled) if profile(examples[0].device).direct_calls else None
    if found is not None:
        _shorten(lowered, found.current_callable)
    return lowered


def _compiled_graph(compiled: Any) -> Any | None:
    """The one graph of Inductor under the wrappers of AOTAutograd, compiled or loaded from a cache; None: not found."""
    from torch._inductor.output_code import CompiledFxGraph

    while compiled is not None and not isinstance(compiled, CompiledFxGraph):
        compiled = getattr(compiled, "__wrapped__", None)
    return compiled


def _shorten(lowered: Lowered, call: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
    """Leave out the wrappers around the compiled code, once it has given by itself what they gave.

    They unwrap tensor subclasses, outputs that alias inputs and the like, which these graphs do not have, and take 5 us
    of the 65 us of a 0.5M-parameter draft.
    """
    wrapped = lowered.run

    def first(inputs: list[Tensor]) -> Sequence[Tensor]:
        outputs = wrapped(inputs)
        try:
            again = call(inputs.copy())  # writes the same keys and values to the same places
            same = len(again) == len(outputs) and all(map(torch.equal, again, outputs))
        except Exception:
            log.debug("the compiled graph cannot be called directly", exc_info=True)
            same = False
        lowered.run = call if same else wrapped
        return outputs

    lowered.run = first


def _settings(device: torch.device) -> dict[str, Any]:
    """Inductor's settings for a decoding step."""
    settings: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "nan_asserts": False}
    settings |= {"fallback_random": True}
    # x.to(bfloat16).to(float32) rounds; by default Inductor takes the two casts for none.
    settings |= {"emulate_precision_casts": True}
    # Steps are recorded whole, with their metadata, by cuda_graphs.py; Inductor's recordings would copy every input.
    settings |= {"triton.cudagraphs": False}
    settings |= dict(profile(device).inductor)
    return settings | vectors.settings() if settings.get("cpp_wrapper") else settings


def _without_values(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    output = new.graph_copy(graph, {})
    new.output(output)
    for node in new.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return new


def _fake(mode: Any, name: str, tensor: Tensor) -> Any:
    known = input_of(name)
    if known is None:
        return mode.from_tensor(tensor, static_shapes=True)
    symbols = known.symbols
    sizes = [EXAMPLE[symbols[i]] if i in symbols else s for i, s in enumerate(tensor.shape)]
    example = torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)
    kinds = [DimDynamic.DUCK if i in symbols else DimDynamic.STATIC for i in range(example.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(example, symbolic_context=context)
