"""TreeProgram: a decoder compiled into a token-tree verifier, bound to one module instance."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.capture import CallSpec, call_spec, original_module
from ..codegen.gpu.sizes import PROMPT_CHUNK
from ..errors import ContextOverflow, InvalidOption, StaleCache
from ..ir import ops
from ..ir.registry import best_kernel
from ..ir.specs import AttentionSpec, Limit
from ..options import Options
from ..passes.insert_state import META_INPUTS
from ..pipeline import Converted, convert
from ..tree import Forest, TokenTree
from .arguments import check_tokens, new_part, prompt_ids_of
from .batch import Batch, Buffer, Part, Shape, lay_out, pack
from .cache import TreeCache
from .cuda_graphs import CudaRecorder, Graphs, GraphStats, Launch, Place, obstacle, run_or_explain
from .lowering import Lowered, lower_eager, lower_inductor
from .semantics import lengths_check, semantic_check
from .weights import WeightWatch

log = logging.getLogger("treespec.program")

# Prompt tokens of a call: a CPU computes at its peak from some dozens of rows on, and more are more scores at a time.
CHUNK_CPU = 256
# Shapes of calls whose inputs a cache keeps: a loop has a few, and each is a few hundred bytes.
MAX_PREPARED = 256


def tree_program(
    model: nn.Module,
    example: Any = None,
    roles: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> TreeProgram:
    """Compile a decoder into a tree verifier; the same instance and options give the same program.

    `model`: an nn.Module, `torch.compile(module)`, or a module compiled in place. `example` and `roles` say how a
    module with another signature than `model(input_ids)` is called (see `capture.call_spec`). Raises `Unsupported` with
    the node, source line and reason when the model cannot be proved to be a causal decoder of a supported kind.
    """
    parsed = Options.parse(options)
    module = original_module(model)
    if not isinstance(module, nn.Module):
        raise InvalidOption(
            name="model", got=type(model).__name__, expected="a torch.nn.Module", fix="Pass the module itself."
        )
    key = (parsed, _example_key(example), tuple(sorted((roles or {}).items())))
    programs = _PROGRAMS.setdefault(module, {})
    program = programs.get(key)
    if program is None:
        program = programs[key] = TreeProgram(module, call_spec(module, example, roles), parsed)
    else:
        program.check_weights(contents=True)
    return program


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, TreeProgram]] = weakref.WeakKeyDictionary()


def _example_key(example: Any) -> Any:
    if example is None:
        return None
    items = (
        example.items()
        if isinstance(example, Mapping)
        else enumerate(example if isinstance(example, tuple) else (example,))
    )
    return tuple((k, _tensor_key(v) if isinstance(v, Tensor) else repr(v)) for k, v in items)


def _tensor_key(value: Tensor) -> Any:
    """A constant argument is part of the program, so its values are part of the key."""
    return str(value.dtype), str(value.device), tuple(value.shape), tuple(value.flatten().tolist())


class TreeProgram:
    """The tree verifier of one module instance. Made by `tree_program`.

    Not thread-safe. Logits have the model's dtype and device and are valid until the next call.
    """

    def __init__(self, model: nn.Module, call: CallSpec, options: Options) -> None:
        self.options = options
        self.compile_seconds = 0.0
        self.compile_count = 0
        self._call = call
        self._model = weakref.ref(model)
        self._caches: weakref.WeakSet[TreeCache] = weakref.WeakSet()
        self._build(model)

    def _build(self, model: nn.Module) -> None:
        started = time.perf_counter()
        meaning = [semantic_check(model, self._call)]
        self._converted: Converted = convert(
            model,
            self._call,
            self.options,
            checks=meaning if self.options.verify_each == "semantic" else (),
            user_checks=meaning if self.options.verify_each == "spec" else (),
        )
        state = self._converted.state
        self._watch = WeightWatch(model, self._converted.weights, state.proved_from)
        lengths_check(model, self._call, state)
        logits: Any = state.logits.meta["val"]
        self.dtype, self.device, self.vocab_size = logits.dtype, logits.device, int(logits.shape[-1])
        self._names = [n.name for n in state.graph.nodes if n.op == "placeholder"]
        self._roles = ["tokens" if n == state.tokens else n for n in self._names]
        self._slots = {role: i for i, role in enumerate(self._roles)}
        self._bind_weights()
        self._lowered: Lowered | None = None
        self._graphs, self._no_graphs = self._recording(self._place, self._launch)
        kernel = best_kernel(ops.commit_path, self.device, self.dtype) if self.options.kernels == "auto" else None
        self._commit = kernel.target if kernel is not None else ops.commit_path
        self.compile_seconds += time.perf_counter() - started

    def _recording(self, place: Place, launch: Launch) -> tuple[Graphs | None, str]:
        """What records calls as CUDA graphs, or why nothing does."""
        wanted = self.options.cuda_graphs
        reason = "option cuda_graphs=False" if wanted is False else obstacle(self.graph_module.graph, self.device)
        if not reason:
            return Graphs(place, launch, CudaRecorder(self.device), self.device), ""
        if wanted is True:
            fix = f"This one cannot: {reason}."
            raise InvalidOption(name="cuda_graphs", got=True, expected="a program that can be recorded", fix=fix)
        return None, reason

    def _bind_weights(self) -> None:
        """Put weights and packed weights into the template of inputs."""
        state = self._converted.state
        for name, ref in self._converted.weights.items():
            ref.tensor = self._watch.current(ref)
            state.constants[name] = ref.tensor
        packed = {name: spec.build(state.constants) for name, spec in state.packs.items()}
        self.packed_bytes = sum(t.numel() * t.element_size() for t in packed.values())
        fixed = {n: t.detach() for n, t in state.constants.items()} | packed
        self._template: list[Any] = [fixed.get(name) for name in self._names]
        self._watch.renew()

    @property
    def sites(self) -> list[AttentionSpec]:
        """Attention sites in graph order."""
        return self._converted.state.sites

    @property
    def max_context(self) -> int | None:
        """Largest number of tokens of one sequence that the program is proved for; None: unlimited."""
        return self._converted.max_context

    @property
    def limits(self) -> list[Limit]:
        """What bounds the context, tightest first."""
        return self._converted.limits

    @property
    def history(self) -> Any:
        """Records of the pipeline's passes."""
        return self._converted.history

    @property
    def notes(self) -> dict[str, Any]:
        """What passes left in `state.notes`."""
        return self._converted.state.notes

    @property
    def graph_stats(self) -> GraphStats:
        """What was recorded as CUDA graphs, or why nothing is."""
        return self._graphs.stats() if self._graphs is not None else GraphStats(off=self._no_graphs)

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The rewritten graph, before lowering."""
        return self._converted.state.gm

    def new_cache(self, max_tokens: int = 4096, slots: int = 1) -> TreeCache:
        """A tree KV cache with room for `max_tokens` tokens in each slot, uncommitted nodes included."""
        for name, value in (("max_tokens", max_tokens), ("slots", slots)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidOption(name=name, got=value, expected="a positive integer")
        self.check_weights(contents=True)
        cache = TreeCache(self.sites, max_tokens, slots, self.device, self._commit)
        self._caches.add(cache)
        return cache

    def prefill(self, prompt_ids: Any, cache: TreeCache, slot: int = 0) -> Tensor:
        """Commit a prompt; returns the next-token logits [V] after it. Appends if the slot is not empty.

        `prompt_ids`: integers, or an int64 tensor [S] or [1, S]. Long prompts run in chunks of
        `options.prefill_chunk`; only the last row's logits are computed. Uncommitted nodes of the slot are dropped.
        """
        ids = prompt_ids_of(prompt_ids)
        self._ready(cache)
        cache._check_slot(slot)
        check_tokens(ids, self._input_vocab, "the prompt")
        self._check_context(cache.length(slot) + len(ids))
        cache._reserve(slot, len(ids))
        chunk = self.options.prefill_chunk or (CHUNK_CPU if self.device.type == "cpu" else PROMPT_CHUNK)
        logits = None
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            tree = TokenTree._trusted(piece, range(-1, len(piece) - 1))
            # NOTE the CPU's kernels look at every page number; others take the slot's emptiness from the shape
            pages = 1 if cache._lengths[slot] or self.device.type == "cpu" else 0
            logits = self._run([Part(slot, tree, prompt=True, pages=pages)], cache, rows=[len(piece) - 1])
            cache._trees[slot] = None
            cache._lengths[slot] += len(piece)
        assert logits is not None
        return logits[0]

    def verify(self, tree: TokenTree | Forest, cache: TreeCache) -> Tensor:
        """Next-token logits [N, V] after the path to each node; drops uncommitted nodes first.

        A `TokenTree` continues slot 0, a `Forest` any slots (rows in the forest's order).
        """
        return self.extend(tree, cache, start=0)

    def extend(self, tree: TokenTree | Forest, cache: TreeCache, start: int | Mapping[int, int] = 0) -> Tensor:
        """As `verify` for nodes >= `start` only; nodes < start are in the cache, uncommitted. [new nodes, V]."""
        items: Sequence[tuple[int, TokenTree]] = tree.items if isinstance(tree, Forest) else ((0, tree),)
        self._ready(cache)
        parts = [new_part(cache, s, t, start.get(s, 0) if isinstance(start, Mapping) else start) for s, t in items]
        for part in parts:
            check_tokens(part.tree.tokens, self._input_vocab, f"the tree of slot {part.slot}")
            self._check_context(cache.length(part.slot) + max(part.tree.depths) + 1)
            cache._reserve(part.slot, len(part.tree))
        logits = self._run(parts, cache)
        for part in parts:
            cache._trees[part.slot] = part.tree
        return logits

    def refresh(self) -> None:
        """Take the module's present weights, whatever was noticed; rebuild when dtype, device or shape changed."""
        self._update(force=True)

    def check_weights(self, contents: bool = False) -> None:
        """Notice weights that changed: identity, address and version; with `contents`, a checksum as well."""
        if self._watch.touched() or self._watch.mode_changed():
            self._update()
        elif contents and (
            self._watch.deep_mode_changed() or self._watch.rearranged() or self._watch.contents_changed()
        ):
            self._update(force=True)

    def _update(self, force: bool = False) -> None:
        model = self._model()
        reason = self._watch.incompatible()
        if model is not None and (reason or self._watch.deep_mode_changed()):
            reason = reason or "the module switched between eval and train mode"
            log.info("rebuilding the tree program: %s", reason)
            self._build(model)
            for cache in list(self._caches):
                cache.stale = reason
            self._caches.clear()
            return
        log.info("repacking weights")
        self._bind_weights()
        if force:
            self._watch.contents_changed()

    def _ready(self, cache: TreeCache) -> None:
        if not isinstance(cache, TreeCache):
            raise InvalidOption(
                name="cache", got=type(cache).__name__, expected="a TreeCache", fix="Use program.new_cache()."
            )
        self.check_weights()
        cache._check_fresh()
        if cache not in self._caches:
            raise StaleCache(reason="this program (it belongs to another one)")

    def _run(self, parts: Sequence[Part], cache: TreeCache, rows: Sequence[int] | None = None) -> Tensor:
        if self._graphs is not None and rows is None:
            logits, self._no_graphs = run_or_explain(self._graphs, parts, cache, self._template, self.options)
            if logits is not None:
                return logits
            if self._no_graphs:
                self._graphs = None
        return self._launch(self._inputs(parts, cache, rows))

    def _launch(self, inputs: list[Tensor]) -> Tensor:
        lowered = self._lowered or self._lower()
        if not torch.is_grad_enabled():  # entering no_grad again would cost 1 us
            return lowered.run(inputs)[0]
        with torch.no_grad():
            return lowered.run(inputs)[0]

    def _inputs(self, parts: Sequence[Part], cache: TreeCache, rows: Sequence[int] | None) -> list[Tensor]:
        if self.device.type != "cpu":
            return self._place(pack(parts, cache, self.device, rows), cache)
        shape, numbers = lay_out(parts, cache, rows)
        held = cache.prepared.get(shape)
        if held is None or held[0] is not self._template:
            if len(cache.prepared) >= MAX_PREPARED:
                cache.prepared.clear()
            buffer = Buffer(Shape(*shape), len(numbers))
            held = cache.prepared[shape] = (self._template, buffer, self._place(buffer.batch, cache))
        held[1].fill(numbers)
        return held[2].copy()  # compiled code empties the list it is given

    def _place(self, batch: Batch, cache: TreeCache) -> list[Tensor]:
        inputs = list(self._template)
        place, meta = self._slots, batch.meta
        inputs[place["tokens"]] = batch.tokens
        inputs[place["positions"]] = meta.positions
        for name in META_INPUTS:
            inputs[place[name]] = getattr(meta, name)
        inputs[place["rows"]] = meta.rows
        first = place["pool_k_0"]
        inputs[first : first + len(cache.pools)] = cache.pools
        return inputs

    def _lower(self) -> Lowered:
        gm = self._converted.state.gm
        if self.options.lowering == "eager":
            self._lowered = lower_eager(gm)
            return self._lowered
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        examples = [self._example(n, fixed) for n, fixed in zip(placeholders, self._template, strict=True)]
        self._lowered = lower_inductor(gm, self._roles, examples)
        self.compile_count += 1
        self.compile_seconds += self._lowered.seconds
        return self._lowered

    def _example(self, node: Any, fixed: Tensor | None) -> Tensor:
        if fixed is not None:
            return fixed
        value = node.meta["val"]
        sizes = [s if isinstance(s, int) else 2 for s in value.shape]
        return torch.zeros(sizes, dtype=value.dtype, device=value.device)

    @property
    def _input_vocab(self) -> int:
        return self._converted.input_vocab or self.vocab_size

    def _check_context(self, length: int) -> None:
        limit = self.max_context
        if limit is not None and length > limit:
            raise ContextOverflow(position=length - 1, max_context=limit, why=self.limits[0].reason)

    def __repr__(self) -> str:
        model = self._model()
        name = type(model).__name__ if model is not None else "a deleted module"
        masks = ", ".join(sorted({s.mask.formula for s in self.sites}))
        context = self.max_context or "unlimited"
        graphs = f", {self._graphs.stats()}" if self._graphs is not None else ""
        return f"TreeProgram({name}: {len(self.sites)} attention sites, mask {masks}, context {context}{graphs})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the sites as a table."""
        from html import escape

        rows = "".join(
            f"<tr><td>{s.index}</td><td>{escape(s.layer or s.name)}</td><td>{s.heads}/{s.kv_heads}</td>"
            f"<td>{s.key_dim}/{s.value_dim}</td><td><code>{escape(s.mask.formula)}</code></td></tr>"
            for s in self.sites
        )
        head = "<tr><th>#</th><th>module</th><th>heads/KV</th><th>dims</th><th>mask</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>"
