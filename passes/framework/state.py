"""What travels through the pipeline: one graph and what has been proved about it.

NOTE a program that was found on a disk is such a state, and runs without the passes: what they analyse with is imported
when one of them asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.ir.arguments import filled
from treespec_compiler.ir.private_torch import enable_python_dispatcher
from treespec_compiler.ir.provenance import layer_path, module_class, op_name, source_line
from treespec_compiler.ir.specs import EVERY_ROW, AttentionSpec, Limit, LogitsSpec, PositionSpec, StateSpec
from treespec_compiler.ir.streaming import Streaming
from treespec_compiler.ir.weights import Expression

from .weights import Weights

if TYPE_CHECKING:
    import sympy

    from ..forms.closed_form import ClosedForms
    from ..sharding.mesh import RankShare
    from ..splitting.stage import StageShare, Unsplit
    from ..streaming.budget import Budget


class OtherLength(Protocol):
    """The same model for another number of tokens, after every pass that stands in front of the one named `before`."""

    def __call__(self, tokens: int, before: str) -> GraphState: ...


@dataclass
class GraphState:
    """A decoder's graph on its way to a tree program.

    `weights` says what each weight placeholder is made of; `inputs` are the placeholders that passes added, in call
    order; `level` names the invariant that the graph satisfies (see `ir.verify`).
    """

    gm: fx.GraphModule
    tokens: str
    position_inputs: list[str]
    weights: Weights
    length: sympy.Symbol
    fake_mode: Any
    guards: list[sympy.Basic]
    level: str = "captured"
    sites: list[AttentionSpec] = field(default_factory=list)
    states: list[StateSpec] = field(default_factory=list)  # sites whose past is no K/V
    positions: list[PositionSpec] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    lone_lengths: list[int] = field(default_factory=list)  # lengths that a run must compare with the model
    proved_from: set[str] = field(default_factory=set)  # weight placeholders whose values a proof used
    written: list[str] = field(default_factory=list)  # inputs that forward writes; outputs 1, 2, ... are them
    caches: list[str] = field(default_factory=list)  # the module's names of them, stripped or not
    notes: dict[str, Any] = field(default_factory=dict)  # what passes found out, by pass name
    max_context: int | None = None  # the context that was asked for
    portable: bool = False  # whether ops are bound to kernels for any device (ATen) only
    storage: str = "exact"  # of packed weights: option `weights`
    padding: list[int] = field(default_factory=list)  # tokens that no other sees, with which no text begins
    outputs: list[str] = field(default_factory=lambda: ["logits"])  # names of the graph's, but for `written`
    model_logits: LogitsSpec = EVERY_ROW  # how the model itself returns them
    logits_given: LogitsSpec = EVERY_ROW  # how the graph does
    cut: RankShare | None = None  # which of several ranks the graph is for; None: there is one
    whole_groups: list[int] = field(default_factory=list)  # KV groups of each site of the whole model, once it is cut
    stage: StageShare | None = None  # which pipeline stage the graph is for; None: there is one
    whole: Unsplit | None = None  # the model that a stage was cut from, once it was
    budget: Budget | None = None  # memory for weights; None: all of them stay
    streaming: Streaming | None = None  # which of them come from a stream
    other_length: OtherLength | None = None  # the model analysed for another length
    counted: dict[Any, bool] = field(default_factory=dict, repr=False)  # what was compared by value, as positions are
    _forms: ClosedForms | None = field(default=None, init=False, repr=False)  # of the graph as it is

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.graph.nodes if n.name == name)

    @property
    def placeholders(self) -> list[str]:
        """Names of the inputs, in order."""
        return [n.name for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def vocab_size(self) -> int:
        """Of the logits."""
        return int(self.logits_value.shape[-1])

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The tensors of weight placeholders, each built when it is asked for."""
        return self.weights.tensors

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.nodes) if n.op == "output")

    @property
    def device(self) -> torch.device:
        return self.logits_value.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logits_value.dtype

    @property
    def logits(self) -> fx.Node:
        return self.output.args[0][0]

    @property
    def logits_value(self) -> Any:
        """A fake value like the model's logits, which a stage that is not the last one does not give."""
        return self.whole.logits if self.whole is not None else self.logits.meta["val"]

    @property
    def graph_digest(self) -> str:
        """Of the graph's code and of shapes and dtypes of its inputs: how fast it is depends on no more of it."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and "val" in node.meta]
        shapes = [f"{node.name}:{tuple(node.meta['val'].shape)}:{node.meta['val'].dtype}" for node in inputs]
        return hashlib.sha256("\0".join((self.gm.code, *shapes)).encode()).hexdigest()

    def closed_forms(self) -> ClosedForms:
        """The closed forms of the graph as it is; one that was rewritten since gets others."""
        from ..forms.closed_form import ClosedForms

        if self._forms is None:
            self._forms = ClosedForms(self.gm, self.constants, self.position_inputs, self.tokens)
        return self._forms

    def proved_by(self, node: fx.Node) -> None:
        """Something is proved by the values of this node: when a weight that it is computed from changes, it is proved
        again.
        """
        from ..forms.evaluate import cone

        self.proved_from |= {n.name for n in cone(node) if n.name in self.weights}

    def rewritten(self) -> None:
        """The graph is another one: what was computed from it is void. `run_passes` says so after a pass as well."""
        if self._forms is not None:
            self.proved_from |= self._forms.numbers
        self._forms = None

    def call(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: fx.Node
    ) -> fx.Node:
        """Insert a call before `like`, with all arguments of its schema, its fake value and `like`'s provenance."""
        self.rewritten()
        args, named = filled(target, args, kwargs or {})
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, named)
        node.meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack") if k in like.meta}
        values = torch.fx.node.map_arg((args, named), lambda n: n.meta["val"])
        # NOTE composite ops (linear, say) ask in C++ for sizes that are symbols here; torch 2.11 and 2.12 answer that
        # only through Python's dispatcher.
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def add_input(self, name: str, value: Tensor) -> fx.Node:
        """Append a placeholder for tensors like `value`."""
        return self._append(name, self.fake_mode.from_tensor(value, static_shapes=True))

    def add_weight(self, name: str, made: Expression) -> fx.Node:
        """The placeholder of a weight expression, one for equal ones; a new one is `name_` and a number."""
        known = self.weights.named(made)
        if known is not None:
            return self.node(known)
        with self.fake_mode:
            value = torch.empty(made.shape, dtype=made.dtype, device=made.device)
        node = self._append(f"{name}_{len(self.weights.derived)}", value)
        self.weights.add(node.name, made)
        return node

    def _append(self, name: str, value: Tensor) -> fx.Node:
        """NOTE always after the last placeholder: inserting after a fixed anchor would reverse them."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.inputs.append(node.name)
        self.rewritten()
        return node

    def add_fake_input(self, name: str, value: Tensor) -> fx.Node:
        """Append a placeholder for tensors like a fake one of `fake_mode`."""
        return self._append(name, value)

    def stream(self, name: str) -> None:
        """Drop the placeholder of a weight that nothing reads, as it comes in a slot."""
        self.graph.erase_node(self.node(name))
        self.weights.stream(name)
        self.rewritten()

    def forget(self, name: str) -> None:
        """Drop a weight that nothing reads."""
        self.graph.erase_node(self.node(name))
        self.weights.drop(name)
        self.rewritten()

    def copy(self) -> GraphState:
        """A state whose graph can be changed; fake values, weights and proofs are shared."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        own: dict[str, Any] = {
            f.name: type(value)(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), (list, dict, set))
        }
        return replace(self, gm=fx.GraphModule(self.gm, graph), weights=self.weights.copy(), **own)

    def become(self, other: GraphState) -> None:
        """Go on with another trace of the same model, on which the same passes ran."""
        kept = ("max_context", "other_length", "lone_lengths")
        for entry in fields(self):
            if entry.name not in kept:
                setattr(self, entry.name, getattr(other, entry.name))

    def clean(self) -> None:
        """Drop dead code; placeholders stay."""
        self.graph.eliminate_dead_code()
        self.gm.recompile()


def refuse(kind: Refusal, reason: str, node: fx.Node | None = None, way_out: str | None = None) -> Unsupported:
    """The refusal to raise, with the node's provenance."""
    if node is None:
        return Unsupported(kind, reason, way_out=way_out)
    named = f"{node.name} = {op_name(node)}" if node.op == "call_function" else node.name
    layer, module = layer_path(node), module_class(node)
    return Unsupported(kind, reason, node=named, source=source_line(node), layer=layer, module=module, way_out=way_out)
