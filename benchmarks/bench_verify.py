"""What a tree costs: verify(N) over one plain decoding step, at a prefix of 256 tokens.

    python benchmarks/bench_verify.py                     # the demo target and a random 57M Llama
    python benchmarks/bench_verify.py --models hf:PATH    # any; `random:HIDDENxLAYERS` makes a Llama
    python benchmarks/bench_verify.py --show benchmarks/results/cpu/verify.json --markdown

A plain step is the fastest of all that run here: one token, or a token padded to 2 or 4, by treespec's program
(Inductor and op by op) and by Hugging Face's compiled static-cache step in several settings. Bursts of calls alternate;
every call ends in the choice of the next token.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Quartiles, Table, describe_run, interleave, progress, read_report, settle, show, write_json
from loops import STATIC, StaticVariant

import treespec_compiler as treespec
from treespec_compiler.cli.models import load
from treespec_compiler.speculation.sampling.ranking import likeliest

NODES = (1, 2, 4, 8, 16, 32, 64)
PADDED = (1, 2, 4)
MODELS = ("demo", "random:768x8")
AIMS = {4: 1.1, 8: 1.3}


def read_model(name: str) -> Any:
    """`demo`, `hf:PATH_OR_ID`, a folder, or `random:HIDDENxLAYERS`: a Llama with arbitrary weights."""
    match = re.fullmatch(r"random:(\d+)x(\d+)", name)
    if not match:
        return load(name if ":" in name or name == "demo" else f"hf:{name}").model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = map(int, match.groups())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=64 * round(hidden * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def binary_tree(nodes: int) -> treespec.TokenTree:
    """Node i hangs below node (i - 1) // 2."""
    return treespec.TokenTree([1 + i % 100 for i in range(nodes)], [(i + 1) // 2 - 1 for i in range(nodes)])


def verifier(model: Any, lowering: str, prompt: torch.Tensor) -> Callable[[int], Callable[[], object]]:
    """N -> a call that verifies a tree of N nodes and chooses every node's next token."""
    program = treespec.tree_program(model, options={"lowering": lowering})
    cache = program.new_cache(prompt.shape[1] + 2 * max(NODES))
    program.prefill(prompt, cache)

    def make(nodes: int) -> Callable[[], object]:
        tree = binary_tree(nodes)

        def call() -> object:
            with torch.inference_mode():
                return likeliest(program.verify(tree, cache))

        return call

    return make


def static_step(
    model: Any, variant: StaticVariant, prompt: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A plain step of the static-cache loop, and what takes it back."""
    loop = variant.build(model, prompt.shape[1] + 64)

    def call() -> object:
        with torch.no_grad():
            return int(loop.decode(token)[0, 0])

    def rewind() -> None:
        with torch.no_grad():
            loop.rewind(prompt.shape[1])

    with torch.no_grad():
        token = loop.prefill(prompt)
    return call, rewind


def measure_model(name: str, given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"{name}: reading, converting, compiling")
    model = read_model(name)
    torch.manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size, (1, given.prefix))
    lowerings = [given.lowering] if given.lowering else ["inductor", "eager"]
    functions: dict[str, Callable[[], object]] = {}
    rewinds: dict[str, Callable[[], object]] = {}
    plain = []
    for lowering in lowerings:
        make = verifier(model, lowering, prompt)
        for nodes in given.nodes if lowering == lowerings[0] else PADDED:
            key = f"treespec {lowering}, {nodes}"
            functions[key] = make(nodes)
            functions[key]()  # compiles
            if nodes in PADDED:
                plain.append(key)
    for variant in [STATIC[key] for key in given.static]:
        say(f"{name}: compiling {variant.name}")
        key = variant.name
        functions[key], rewinds[key] = static_step(model, variant, prompt)
        plain.append(key)
    settle()
    say(f"{name}: measuring")
    seconds = interleave(functions, given.rounds, prepare=rewinds)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "verify": {str(nodes): f"treespec {lowerings[0]}, {nodes}" for nodes in given.nodes},
        "plain": plain,
        "seconds": seconds,
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    models = []
    with progress(len(given.models) * (2 + len(given.static))) as say:
        for name in given.models:
            models.append(measure_model(name, given, say))
            torch._dynamo.reset()
    report = {
        "benchmark": "verify",
        "run": describe_run(given.threads),
        "settings": {"prefix": given.prefix, "nodes": list(given.nodes), "dtype": "float32"},
        "models": models,
    }
    return report | {"summary": summarize(report)}


def summarize(report: dict[str, Any]) -> list[dict[str, Any]]:
    """For each model: the fastest plain step, and every verify(N) in units of it."""
    summary = []
    for entry in report["models"]:
        seconds = {name: median(values) for name, values in entry["seconds"].items()}
        best = min(entry["plain"], key=seconds.__getitem__)
        ratios = {n: seconds[key] / seconds[best] for n, key in entry["verify"].items()}
        summary.append(
            {"model": entry["model"], "decode": best, "decode_seconds": seconds[best], "verify_over_decode": ratios}
        )
    return summary


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    run, shown, notes = report["run"], [], []
    where = f"prefix {report['settings']['prefix']}, float32, {run['threads']} threads, {run['device']}"
    nodes = [str(n) for n in report["settings"]["nodes"]]
    ratios = Table(f"verify(N) / decode, {where}", ("model", "decode, ms", *(f"N={n}" for n in nodes)))
    for entry, figures in zip(report["models"], report["summary"]):
        name = f"{entry['model']} ({entry['parameters'] / 1e6:.1f}M)"
        over = figures["verify_over_decode"]
        ratios.add(name, f"{1e3 * figures['decode_seconds']:.3f}", *(f"{over[n]:.2f}" for n in nodes))
        steps = Table(f"{name}: milliseconds a call, median and quartiles", ("", "ms", "/ decode"))
        for key, values in entry["seconds"].items():
            times = Quartiles.of([1e3 * s for s in values])
            plain = " *" if key in entry["plain"] else ""
            ratio = f"{times.median / 1e3 / figures['decode_seconds']:.2f}"
            steps.add(key + plain, f"{times:.3f}", ratio, bold=key == figures["decode"])
        shown.append(steps)
        aims = "; ".join(f"verify({n}) {over[str(n)]:.2f} (aim {aim})" for n, aim in AIMS.items() if str(n) in over)
        notes.append(f"{name}: decode = {figures['decode']}{'; ' if aims else ''}{aims}")
    return [ratios, *shown], [*notes, "* plain steps; the fastest one is `decode`"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="MODEL", nargs="+", default=MODELS, help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--nodes", metavar="N", type=int, nargs="+", default=NODES, help="tree sizes")
    parser.add_argument("--prefix", metavar="S", type=int, default=256, help="committed tokens (default: 256)")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="(default: 2)")
    parser.add_argument("--static", nargs="*", choices=STATIC, default=[*STATIC], help="Hugging Face's steps to try")
    parser.add_argument("--lowering", choices=("inductor", "eager"), help="of treespec's programs (default: both)")
    parser.add_argument("--rounds", metavar="N", type=int, default=60, help="bursts of 8 calls (default: 60)")
    parser.add_argument("--output", metavar="FILE", type=Path, default=RESULTS / "verify.json")
    parser.add_argument("--show", metavar="FILE", type=Path, help="print the tables of an earlier run")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    given = parser.parse_args(arguments)
    if given.show:
        report = read_report(given.show, "run", "settings", "models", benchmark="verify")
        report["summary"] = summarize(report)
    else:
        report = measure(given)
        write_json(given.output, report)
    show(*tables(report), markdown=given.markdown)


if __name__ == "__main__":
    main()
