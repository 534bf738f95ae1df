"""A pass that only reads: how many floating-point operations one tree program call takes, as a formula in T.

python examples/count_flops.py
treespec opt py:examples.count_flops:model --pipeline default,count-flops --timing
"""

from __future__ import annotations

import sympy
import torch
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.ir.provenance import layer_path, op_name
from treespec_compiler.passes.forms.closed_form import shape_of
from treespec_compiler.passes.framework.state import GraphState

PRODUCTS = {"aten.linear", "aten.matmul", "aten.mm", "aten.bmm"}


@treespec.register_pass(
    "count flops", after="token locality", changes=False, promises="unchanged; notes['flops'] is set"
)
def count_flops(state: GraphState) -> int:
    """`state.notes["flops"]`: module -> operations of its matrix products, a sympy expression in T."""
    flops: dict[str, sympy.Expr] = {}
    counted = 0
    for node in state.graph.nodes:
        if op_name(node) in PRODUCTS:
            contracted = shape_of(node.args[0])[-1]
            work = 2 * contracted * sympy.prod(shape_of(node))
            name = layer_path(node) or "outside any module"
            flops[name] = flops.get(name, sympy.Integer(0)) + work.xreplace({state.length: sympy.Symbol("T")})
            counted += 1
    state.notes["flops"] = flops
    return counted


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def main() -> None:
    program = treespec.tree_program(model(), options={"lowering": "eager", "pipeline": "default,count-flops"})
    flops = program.notes["flops"]
    for name, work in flops.items():
        print(f"{name:<24} {work}")
    print(f"{'all matrix products':<24} {sympy.expand(sum(flops.values()))}")


if __name__ == "__main__":
    main()
