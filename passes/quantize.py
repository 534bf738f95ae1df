"""quantize: weights of products become what they are when rounded to eight or four bits, for all that reads them.

Asked for by `weights="int8"` or `"int4"`. From here on the target is the rounded model: a program is compared with the
module run with these very values (`program.target`), and "fuse" stores them in the form that holds them exactly.
"""

from __future__ import annotations

import torch

from treespec_compiler.errors import InvalidOption
from treespec_compiler.ir import ops
from treespec_compiler.ir.narrow import FORMS
from treespec_compiler.ir.quantize import STORAGES
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.ir.stored_weights import Quantized
from treespec_compiler.ir.weights import Expression, Source, Transpose

from .framework.manager import Pass
from .framework.state import GraphState
from .spellings.products import products


def quantize(state: GraphState) -> int:
    """Tables that are read by row as well (a tied embedding) are rounded with the product's weight: they are one."""
    _check_kernel(state)
    block = FORMS[STORAGES[state.storage]].k_block
    summed: dict[str, set[int]] = {}
    for member in (
        member for group in products(state, lambda weight: weight.dtype is torch.float32) for member in group
    ):
        source, dim = _summed(member.weight)
        if source is not None and source.shape[dim] % block == 0:
            summed.setdefault(source.name, set()).add(dim)
    proved = {source for name in state.proved_from & set(state.weights) for source in state.weights[name].sources}
    count = 0
    for name, made in list(state.weights.items()):
        # NOTE values that a proof used stay as they are: it was made from them
        if not isinstance(made, Source) or made.name in proved or len(dims := summed.get(made.name, set())) != 1:
            continue
        rounded = state.add_weight("rounded", Quantized(made, state.storage, *dims))
        state.node(name).replace_all_uses_with(rounded)
        count += 1
    if not count:
        expected = f"'exact' or 'float32', where no product's weight is a matrix of the model's in blocks of {block}"
        raise InvalidOption(name="weights", got=state.storage, expected=expected)
    return count


def _summed(made: Expression) -> tuple[Source | None, int]:
    """A model's own matrix, and the dimension of it that a product sums over; None: the weight is made of others."""
    if isinstance(made, Transpose):
        source, dim = _summed(made.of)
        return source, 1 - dim
    return (made, 1) if isinstance(made, Source) else (None, 0)


def _check_kernel(state: GraphState) -> None:
    kernel = best_kernel(ops.packed_linear, state.device, state.dtype, given=("form",))
    if kernel is None or state.portable:
        raise InvalidOption(
            name="weights",
            got=state.storage,
            expected=f"'exact' or 'float32' for a model in {state.dtype} on {state.device}",
            fix="Rounded weights are stored by the CPU's kernels, for models in float32: load the model so, with a C++ "
            "compiler at hand and option kernels='auto'.",
        )


PASS = Pass(
    "quantize",
    quantize,
    before="rows are selected",
    after="same level; matrices of products are the module's, rounded to blocks of eight or four bits",
    optional=True,
    needs=("select rows",),
    place_before=("fuse", "bind kernels"),
    wanted=lambda state, options: options.weights in STORAGES,
    standard=False,
)
