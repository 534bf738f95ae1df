"""Lowering: a bound graph becomes a callable, by Inductor once for all shapes, or op by op.

The symbols of `ir.inputs` are dynamic, so no length, tree or cache size compiles anything again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.alone import alone
from ..errors import InvalidOption, MissingCompiler
from ..ir.collectives import ALL_GATHER, ALL_REDUCE
from ..ir.device import profile
from ..ir.inputs import input_of
from ..ir.library import arguments, fingerprint, numbered
from ..ir.private_torch import OpOverload
from ..logs import logger
from . import vectors
from .kept_code import CallPlan, LibraryCall, keep, library_of
from .slabs import Slab, flat, groups, kind, slab, slots, stream_call, streamed_units, units

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
    libraries: Sequence[Path] = ()
    """What Inductor built for it; none: it is more than libraries."""
    plan: CallPlan | None = None
    """In which order they are called."""
    shortened: bool = True
    """Whether the libraries alone give what was lowered."""

    def keep(self, name: str) -> None:
        """Keep the compiled code under this name, where it is all in libraries."""
        if self.plan is not None and self.shortened and self.libraries:
            keep(name, self.plan, self.libraries)


def lower_eager(gm: fx.GraphModule) -> Lowered:
    """Run the graph op by op."""

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        return gm(*inputs)

    return Lowered(run, 0.0)


def lower_inductor(gm: fx.GraphModule, names: Sequence[str], examples: Sequence[Tensor]) -> Lowered:
    """Compile with Inductor. `names` are the roles of the inputs, `examples` real tensors of any size.

    Layers that are alike are compiled once where the device's profile says so (`program.slabs`).
    """
    global _compile_calls
    started = time.perf_counter()
    # NOTE a fresh mode and ShapeEnv for every compile: reusing the traced ones silently specialises to their sizes.
    mode = _fresh_mode()
    fakes = [_fake(mode, name, tensor) for name, tensor in zip(names, examples, strict=True)]
    parts = _parts(gm, fakes, mode, repeats=profile(examples[0].device).repeats)
    if parts is None:
        lowered = _compiled(gm, gm.graph, fakes, mode, examples[0].device)
        _one_piece(lowered, gm.graph)
    else:
        lowered = _joined(gm, parts, names, examples)
    _compile_calls += 1
    lowered.seconds = time.perf_counter() - started
    return lowered


def _fresh_mode() -> Any:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # 0 and 1 are not special: a tree of one node runs on the same code as any other.
    env = ShapeEnv(specialize_zero_one=False, duck_shape=True)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


def _compiled(root: nn.Module, graph: fx.Graph, fakes: Sequence[Any], mode: Any, device: torch.device) -> Lowered:
    """One graph through Inductor."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    module = fx.GraphModule(root, _without_values(graph))
    settings = _settings(device)
    # NOTE Inductor's caches know a custom op by its name: code compiled for another schema of it would run, and crash.
    shared: Any = torch.compiler.config
    tag = f"{shared.cache_key_tag} treespec {fingerprint()}"
    if any(node.target in (ALL_REDUCE, ALL_GATHER) for node in graph.nodes):
        settings["cpp_wrapper"] = False  # it does not know how to name a group (torch 2.13)
    if settings.get("cpp_wrapper"):
        _spell_in_numbers(module)
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
        from ..capture.torch_errors import lacks_compiler  # NOTE it imports Dynamo

        if lacks_compiler(error):
            names = [config.cpp.cxx] if isinstance(config.cpp.cxx, str) else config.cpp.cxx
            raise MissingCompiler(looked_for=", ".join(name for name in names if name)) from error
        raise

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        return compiled(*inputs)

    lowered = Lowered(run, 0.0)
    found = _compiled_graph(compiled) if profile(device).direct_calls else None
    if found is not None:
        _shorten(lowered, found.current_callable)
        library = library_of(found.current_callable)
        lowered.libraries = [library] if library is not None else []
    return lowered


@dataclass
class _Part:
    """A slab, what it reads as fake tensors, and what tells which code it is."""

    slab: Slab
    fakes: list[Any]
    key: Hashable


def _parts(gm: fx.GraphModule, fakes: Sequence[Any], mode: Any, repeats: bool) -> list[_Part] | None:
    """The slabs of a graph whose layers repeat, or whose weights are streamed; None: it is one piece."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known = dict(zip(placeholders, fakes, strict=True))
    streamed = streamed_units(gm.graph)
    if len(streamed) > 1:
        parts = _flow([slab(nodes) for nodes in streamed], known, mode)
        if parts is None:
            got = "a model that hands other values from layer to layer than contiguous tensors"
            expected = "such tensors alone: what is compiled is cut between streamed layers"
            raise InvalidOption(name="offload", got=got, expected=expected, fix="Add lowering='eager'.")
        return parts
    single = units(gm.graph) if repeats else []
    found = _flow([slab(nodes) for nodes in single], dict(known), mode)
    if not found or flat(gm.graph.output_node().args[0]) is None:
        return None
    together = groups([part.key for part in found])
    if len(together) < 2:
        return None
    log.info("%d pieces of a graph are compiled as %d slabs", len(single), len(together))
    return _flow([slab([n for i in each for n in single[i]]) for each in together], known, mode)


def _flow(slabs: Sequence[Slab], known: dict[fx.Node, Any], mode: Any) -> list[_Part] | None:
    """What every slab reads, by running each distinct one on fake tensors; None: a value cannot cross its cut."""
    parts: list[_Part] = []
    given: dict[Hashable, Sequence[Any]] = {}
    for each in slabs:
        fakes = [known[node] for node in each.outer]
        kinds = [kind(fake) for fake in fakes]
        key = (each.structure, tuple(kinds))
        if None in kinds:
            return None
        if key not in given and stream_call(each) is not None:
            given[key] = ()
        if key not in given:
            with mode, torch.no_grad():
                given[key] = fx.Interpreter(fx.GraphModule(nn.Module(), each.graph)).run(*fakes)
        if any(kind(value) is None or not value.is_contiguous() for value in given[key]):
            return None
        known |= zip(each.results, given[key], strict=True)
        parts.append(_Part(each, fakes, key))
    return parts


def _joined(gm: fx.GraphModule, parts: Sequence[_Part], names: Sequence[str], examples: Sequence[Tensor]) -> Lowered:
    """Each distinct slab compiled, and all of them run in turn."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    outputs = flat(gm.graph.output_node().args[0]) or []
    inputs = {node: (name, tensor) for node, name, tensor in zip(placeholders, names, examples, strict=True)}
    made: dict[Hashable, Lowered] = {}
    for part in parts:
        call = stream_call(part.slab)
        if call is not None:
            made[part.key] = _called(call)
        if part.key not in made:
            mode = _fresh_mode()
            fakes = [
                _fake(mode, *inputs[node]) if node in inputs else _like(mode, fake)
                for node, fake in zip(part.slab.outer, part.fakes, strict=True)
            ]
            made[part.key] = _compiled(nn.Module(), part.slab.graph, fakes, mode, examples[0].device)
    at = slots([part.slab for part in parts], placeholders, outputs)
    number = {key: i for i, key in enumerate(made)}
    steps = [(number[part.key], [at[n] for n in part.slab.outer], [at[n] for n in part.slab.results]) for part in parts]
    plan = CallPlan(steps, max(at.values()) + 1 - len(placeholders), [at[node] for node in outputs])
    pieces = list(made.values())
    run = plan.run([_later(piece) for piece in pieces])
    libraries = [path for piece in pieces for path in piece.libraries]
    return Joined(run, 0.0, libraries if all(piece.libraries for piece in pieces) else (), plan, pieces=pieces)


def _later(piece: Lowered) -> LibraryCall:
    """Its call, which becomes another one after the first."""
    return lambda values: piece.run(values)


@dataclass
class Joined(Lowered):
    """Pieces that are called in turn."""

    pieces: Sequence[Lowered] = ()

    def keep(self, name: str) -> None:
        self.shortened = all(piece.shortened for piece in self.pieces)
        super().keep(name)


def _one_piece(lowered: Lowered, graph: fx.Graph) -> None:
    """The plan of a graph that is lowered whole."""
    outputs = flat(graph.output_node().args[0])
    if outputs is not None:
        inputs = sum(n.op == "placeholder" for n in graph.nodes)
        slots_of = range(inputs, inputs + len(outputs))
        lowered.plan = CallPlan([(0, range(inputs), slots_of)], len(outputs), slots_of)


def _called(call: fx.Node) -> Lowered:
    """A fetch or a release by itself. The slot's inputs are left out: they only say what comes before and after."""
    target: Any = call.target
    stream, layer = call.args[:2]

    def run(values: list[Tensor]) -> Sequence[Tensor]:
        target(stream, layer, [])
        return ()

    return Lowered(run, 0.0)


def _like(mode: Any, fake: Any) -> Any:
    """A value between slabs, for a compile of its own: its symbols are told by the sizes of `EXAMPLE`."""
    sizes = [int(s) if isinstance(s, int) else s.node.hint for s in fake.shape]
    dynamic = [not isinstance(s, int) for s in fake.shape]
    return _with_symbols(mode, torch.empty(sizes, dtype=fake.dtype, device=fake.device), dynamic)


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
        lowered.shortened = same
        return outputs

    lowered.run, lowered.shortened = first, False


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


def _spell_in_numbers(module: fx.GraphModule) -> None:
    """Texts among the arguments of treespec's ops become numbers, where they have one: see `ir.numbered`."""
    for node in module.graph.nodes:
        found = numbered(node.target, arguments(node)) if isinstance(node.target, OpOverload) else None
        if found is not None:
            (node.target, node.args), node.kwargs = found, {}
    module.recompile()


def _fake(mode: Any, name: str, tensor: Tensor) -> Any:
    known = input_of(name)
    if known is None:
        return mode.from_tensor(tensor, static_shapes=True)
    symbols = known.symbols
    sizes = [EXAMPLE[symbols[i]] if i in symbols else s for i, s in enumerate(tensor.shape)]
    dynamic = [i in symbols for i in range(tensor.dim())]
    return _with_symbols(mode, torch.empty(sizes, dtype=tensor.dtype, device=tensor.device), dynamic)


def _with_symbols(mode: Any, example: Tensor, dynamic: list[bool]) -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    kinds = [DimDynamic.DUCK if each else DimDynamic.STATIC for each in dynamic]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(example, symbolic_context=context)
