"""fuse: linears on constant weights become packed skinny products; linears that share their input become one.

Decoding multiplies few rows by large matrices, so the weight is read once, in the order the kernel wants it, and
q/k/v or gate/up projections are one product whose result is split. It is stored in the narrowest form that holds its
every value (`ir.narrow`), which is found from the values and from what is known of their file; those of one input that
differ in form are products apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from treespec_compiler.ir import ops
from treespec_compiler.ir.device import profile
from treespec_compiler.ir.narrow import FORMS, narrowest
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.ir.stored_weights import Pack, headers_of
from treespec_compiler.ir.weights import Expression, Join
from treespec_compiler.options import Options

from .framework.manager import Pass
from .framework.state import GraphState
from .spellings.products import Product, joined_bias, joined_weight, products, replace_by_slices


def pack_linears(state: GraphState) -> int:
    groups = products(state, lambda weight: weight.dtype in profile(weight.device).packs)
    for members in groups:
        forms: dict[str, list[Product]] = {}
        for member in members:
            forms.setdefault(_form(state, member.weight), []).append(member)
        for form, alike in forms.items():
            _pack(state, alike, form)
    return sum(map(len, groups)) + _pack_embeddings(state)


def unfit(state: GraphState, sources: Iterable[str], narrower: bool = False) -> Pack | None:
    """A packed weight made of one of these sources whose present values its form does not hold, or, with `narrower`,
    that a narrower form would hold; None: there is none.
    """
    changed = set(sources)
    for made in (*state.weights.derived.values(), *state.weights.streamed.values()):
        if isinstance(made, Pack) and not changed.isdisjoint(made.sources) and made.of.dtype is torch.float32:
            if (made.form in FORMS or narrower) and _form(state, made.of) != made.form:
                return made
    return None


def _form(state: GraphState, made: Expression) -> str:
    kernel = best_kernel(ops.packed_linear, state.device, state.dtype, given=("form",))
    if state.storage == "float32" or kernel is None or made.dtype is not torch.float32:
        return "float32"
    headers = headers_of(made, state.weights.read)
    return narrowest(made.build(state.weights.read), None if headers is None else (headers.form, headers.bytes))


def _pack(state: GraphState, members: Sequence[Product], form: str) -> None:
    made, joined = Pack(joined_weight(members), form), joined_bias(members)
    weight = state.add_weight("packed", made)
    bias = state.add_weight("packed", joined) if joined is not None else None
    args = (members[0].x, weight, bias, sum(m.out_features for m in members), form)
    product = state.call(torch.ops.treespec.packed_linear.default, args, like=members[0].node)
    replace_by_slices(state, members, product)


def _pack_embeddings(state: GraphState) -> int:
    """Rows of a table that is packed for a product (a tied head) are read from there: its bytes are there once."""
    if best_kernel(ops.packed_embedding, state.device, state.dtype) is None:
        return 0
    packed: dict[Expression, tuple[str, str]] = {}
    for name, made in state.weights.derived.items():
        if isinstance(made, Pack) and isinstance(made.of, Join) and len(made.of.pieces) == 1:
            packed[made.of.pieces[0]] = name, made.form
    count = 0
    for node in [node for node in state.graph.nodes if node.target is torch.ops.aten.embedding.default]:
        table, ids = node.args[:2]
        own = state.weights.get(table.name)
        found = packed.get(own) if own is not None else None
        if found is None or ids.meta["val"].dtype is not torch.int64:
            continue
        args = (ids, state.node(found[0]), int(table.meta["val"].shape[0]), found[1])
        node.replace_all_uses_with(state.call(torch.ops.treespec.packed_embedding.default, args, like=node))
        count += 1
    return count


def _has_kernel(state: GraphState, options: Options) -> bool:
    kernel = best_kernel(ops.packed_linear, state.device, state.dtype)
    return options.kernels == "auto" and kernel is not None


PASS = Pass(
    "fuse",
    pack_linears,
    before="any level from stateful on",
    after="same level; products with constant weights are treespec::packed_linear, one per shared input and form, and"
    " tables that are packed for one are read by treespec::packed_embedding",
    optional=True,
    needs=("select rows",),
    place_before=("bind kernels",),
    wanted=_has_kernel,
)
