"""A pass that rewrites: every attention output passes through a probe that keeps its size, in any lowering.

python examples/activation_probe.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.passes.framework.state import GraphState

SEEN: dict[str, list[float]] = {}


# NOTE an op of its own: Inductor keeps calls of custom ops, and would not keep a Python function's side effects.
@torch.library.custom_op("treespec_examples::probe", mutates_args=())
def probe(x: Tensor, name: str) -> Tensor:
    SEEN.setdefault(name, []).append(float(x.float().pow(2).mean().sqrt()))
    return x.clone()  # a custom op must not return its input


@probe.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


@treespec.register_pass("activation probe", after="insert state", promises="attention outputs pass through a probe")
def insert_probes(state: GraphState) -> int:
    sites = [n for n in state.graph.nodes if "site" in n.meta]
    for node in sites:
        users = list(node.users)
        name = state.sites[node.meta["site"]].name
        new = state.call(torch.ops.treespec_examples.probe.default, (node, name), like=node.next)
        for user in users:
            user.replace_input_with(node, new)
    return len(sites)


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def main(lowering: str = "inductor") -> None:
    program = treespec.tree_program(model(), options={"lowering": lowering, "pipeline": "default,activation-probe"})
    cache = program.new_cache(max_tokens=64)
    SEEN.clear()  # the probe also saw the runs that compared the pass, and the program, with the model
    program.prefill([1, 2, 3, 4], cache)
    program.verify(treespec.TokenTree([5, 6, 7], [-1, 0, 0]), cache)
    for name, sizes in SEEN.items():
        print(f"{name:<28} root mean square {', '.join(f'{s:.4f}' for s in sizes)}")


if __name__ == "__main__":
    main()
