"""What a tree costs in a hybrid: verify(N) over one token of the model's own recurrence, and what a node takes to keep.

    python benchmarks/bench_hybrid.py                      # shapes of Qwen3.5 and Mamba-2, about 60M parameters each
    python benchmarks/bench_hybrid.py --width 64 --layers 4 --nodes 1 4    # small ones
    python benchmarks/bench_hybrid.py --show FILE --markdown

Three ways, in bursts that alternate: treespec's program; the model in transformers, a token at a time with its own
cache; and the same with a snapshot of every state a node, as engines verify drafts elsewhere: restore the parent's
state, compute one token, keep its state (K/V of attention are not copied, and those of a path's earlier nodes are not
put back: it costs what it must, and its logits are not compared). Weights are arbitrary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Quartiles, Table, describe_run, interleave, progress, read_report, settle, show, write_json
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.speculation.sampling.ranking import likeliest

SHAPES = ("qwen3.5", "mamba2")
NODES = (1, 2, 4, 8, 16)
AIM, AIMED = 1.4, 8
DECODE = "transformers, one token"


def read_model(shape: str, width: int, layers: int) -> Any:
    """Qwen3.5: three gated delta rules to one attention. Mamba-2: nothing else than its scan."""
    from transformers import AutoModelForCausalLM, Mamba2Config, Qwen3_5TextConfig

    torch.manual_seed(0)
    if shape == "mamba2":
        sizes = {"num_heads": width // 32, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2}
        config: Any = Mamba2Config(vocab_size=4096, hidden_size=width, num_hidden_layers=3 * layers, **sizes)
    else:
        delta = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": max(1, width // 128)}
        config = Qwen3_5TextConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            layer_types=[("full_attention" if i % 4 == 3 else "linear_attention") for i in range(layers)],
            num_attention_heads=max(1, width // 64),
            num_key_value_heads=max(1, width // 256),
            head_dim=64,
            linear_num_value_heads=max(1, width // 64),
            **delta,
        )
    return AutoModelForCausalLM.from_config(config).eval()


def binary_tree(nodes: int) -> treespec.TokenTree:
    """Node i hangs below node (i - 1) // 2."""
    return treespec.TokenTree([1 + i % 100 for i in range(nodes)], [(i + 1) // 2 - 1 for i in range(nodes)])


class Stepped:
    """The model behind a prompt, a token at a time, with its own cache."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.length = model, prompt.shape[1]
        with torch.no_grad():
            out = model(prompt, use_cache=True)
        self.name = "past_key_values" if "past_key_values" in out else "cache_params"
        self.cache = out[self.name]
        self.before = self.snapshot()

    def snapshot(self) -> list[dict[Any, Tensor]]:
        """Copies of all states but K/V."""
        kinds = [getattr(layer, name) for layer in self.cache.layers for name in _STATES if hasattr(layer, name)]
        return [{key: value.clone() for key, value in kind.items()} for kind in kinds]

    def restore(self, states: Sequence[dict[Any, Tensor]], tokens: int) -> None:
        """Go on behind so many tokens of the prompt and a path, with these states."""
        kinds = [getattr(layer, name) for layer in self.cache.layers for name in _STATES if hasattr(layer, name)]
        for kind, kept in zip(kinds, states, strict=True):
            for key, value in kept.items():
                kind[key].copy_(value)
        for layer in self.cache.layers:
            if hasattr(layer, "keys"):
                layer.keys, layer.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]

    def step(self, token: int) -> object:
        with torch.no_grad():
            return likeliest(self.model(torch.tensor([[token]]), **{self.name: self.cache}, use_cache=True).logits[0])

    def verify(self, tree: treespec.TokenTree) -> object:
        """Every node from its parent's snapshot."""
        kept: list[list[dict[Any, Tensor]]] = []
        found: object = None
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            self.restore(self.before if parent < 0 else kept[parent], self.length + len(tree.path(node)) - 1)
            found = self.step(token)
            kept.append(self.snapshot())
        return found

    def state_bytes(self) -> int:
        return sum(t.nbytes for kind in self.before for t in kind.values())


_STATES = ("conv_states", "recurrent_states")


def verifier(model: Any, lowering: str, prompt: Tensor) -> tuple[Any, Callable[[int], Callable[[], object]]]:
    """The program, and N -> a call that verifies a tree of N nodes."""
    program = treespec.tree_program(model, options={"lowering": lowering})
    cache = program.new_cache(prompt.shape[1] + 2 * max(NODES))
    program.prefill(prompt, cache)

    def make(nodes: int) -> Callable[[], object]:
        tree = binary_tree(nodes)

        def call() -> object:
            with torch.inference_mode():
                return likeliest(program.verify(tree, cache))

        return call

    return program, make


def measure_shape(shape: str, given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{shape}: making, converting, compiling")
    model = read_model(shape, given.width, given.layers)
    prompt = torch.randint(1, 4096, (1, given.prefix), generator=torch.Generator().manual_seed(0))
    program, make = verifier(model, given.lowering, prompt)
    stepped = Stepped(model, prompt)

    def rewind() -> None:
        stepped.restore(stepped.before, given.prefix)

    functions: dict[str, Callable[[], object]] = {f"treespec, {n}": make(n) for n in given.nodes}
    functions[DECODE] = lambda: stepped.step(7)
    trees = {n: binary_tree(n) for n in given.nodes}
    functions |= {f"snapshots, {n}": lambda tree=tree: stepped.verify(tree) for n, tree in trees.items()}
    for call in functions.values():
        call()  # compiles
    settle()
    say(f"{shape}: measuring")
    seconds = interleave(functions, given.rounds, burst=given.burst, prepare={DECODE: rewind})
    kv = sum(site.bytes_per_token() for site in program.sites)
    return {
        "model": shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "node_bytes": {
            "treespec": kv + sum(s.bytes_per_node() for s in program.states),
            "snapshots": kv + stepped.state_bytes(),
        },
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    with progress(2 * len(given.shapes)) as say:
        models = [measure_shape(shape, given, say) for shape in given.shapes]
    settings = {"prefix": given.prefix, "nodes": list(given.nodes), "dtype": "float32", "lowering": given.lowering}
    report = {"benchmark": "hybrid", "run": describe_run(given.threads), "settings": settings, "models": models}
    return report | {"summary": summarize(report)}


def summarize(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each model: medians of every call, in units of treespec's own and of the model's own single token."""
    summary = []
    for entry in report["models"]:
        times = {name: median(values) for name, values in entry["seconds"].items()}
        own = times.get("treespec, 1", min(times.values()))
        ratios = {name: {"decode": t / own, "transformers": t / times[DECODE]} for name, t in times.items()}
        summary.append({"model": entry["model"], "seconds": times, "over": ratios})
    return summary


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    run, found, notes = report["run"], [], []
    for entry, figures in zip(report["models"], report["summary"], strict=True):
        title = f"{entry['model']} ({entry['parameters'] / 1e6:.1f}M), prefix {report['settings']['prefix']}, float32, "
        title += f"{run['threads']} threads, {run['device']}"
        table = Table(title, ("nodes", "ms", "/ treespec's one", "/ transformers' one"))
        for name, values in entry["seconds"].items():
            over = figures["over"][name]
            times = f"{Quartiles.of([1e3 * s for s in values]):.3f}"
            table.add(name, times, f"{over['decode']:.2f}", f"{over['transformers']:.2f}")
        found.append(table)
        kept = entry["node_bytes"]
        notes.append(f"{entry['model']}: a node takes {kept['treespec']} bytes, with a snapshot {kept['snapshots']}")
        name = f"treespec, {AIMED}"
        if name in figures["over"]:
            notes.append(
                f"{entry['model']}: verify({AIMED}) / decode {figures['over'][name]['decode']:.2f} (aim {AIM})"
            )
    return found, notes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--width", metavar="N", type=int, default=768, help="of the hidden state (default: 768)")
    parser.add_argument("--layers", metavar="N", type=int, default=8, help="Mamba-2: times 3 (default: 8)")
    parser.add_argument("--nodes", metavar="N", type=int, nargs="+", default=NODES, help="tree sizes")
    parser.add_argument("--prefix", metavar="S", type=int, default=256, help="committed tokens (default: 256)")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="(default: 2)")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor", help="of treespec's programs")
    parser.add_argument("--rounds", metavar="N", type=int, default=30, help="bursts (default: 30)")
    parser.add_argument("--burst", metavar="N", type=int, default=4, help="calls in one (default: 4)")
    parser.add_argument("--output", metavar="FILE", type=Path, default=RESULTS / "hybrid.json")
    parser.add_argument("--show", metavar="FILE", type=Path, help="print the tables of an earlier run")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    given = parser.parse_args(arguments)
    if given.show:
        report = read_report(given.show, "run", "settings", "models", benchmark="hybrid")
        report["summary"] = summarize(report)
    else:
        report = measure(given)
        write_json(given.output, report)
    show(*tables(report), markdown=given.markdown)


if __name__ == "__main__":
    main()
