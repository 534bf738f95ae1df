"""What each stochastic verifier accepts from trees of equal shape: the direction of SpecInfer's Table 3, and beyond.

    python benchmarks/bench_verifiers.py                        # the demo pair; writes results/cpu/verifiers.json
    python benchmarks/bench_verifiers.py --target DIR --draft DIR --prompts 4

Table 3 (arXiv 2305.09781) compares multi-step speculative sampling with naive sampling at width 5 and depth 8; its
trees are <1,1,5,1,1,1,1,1>. `<5,1,1,1,1,1,1,1>` branches at the root instead. Figures are counts of tokens, not times:
the models run without Inductor.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, describe_run, load_pair, write_json
from rich.console import Console
from rich.table import Table

import treespec_compiler as treespec
from treespec_compiler.speculation.verifiers import VERIFIERS

TREES = ("1,1,5,1,1,1,1,1", "5,1,1,1,1,1,1,1")
CHAIN = "1,1,1,1,1,1,1,1"
PAIRS = [
    ("naive", "top-k"),
    ("naive", "iid"),
    ("multi-step", "iid"),
    ("recursive", "without-replacement"),
    ("traversal", "iid"),
    ("traversal", "without-replacement"),
]
CHAIN_PAIRS = [("naive", "top-k"), ("multi-step", "iid"), ("block", "iid")]


@dataclass
class Entry:
    temperature: float
    tree: str
    verifier: str
    sampler: str
    tokens_per_step: float
    """Accepted tokens and the bonus token: what Table 3 counts."""
    standard_error: float
    """Over prompts and seeds."""
    nodes_per_step: float
    steps: int


def measure(
    target: Any, draft: Any, prompts: list[list[int]], temperature: float, tree: str, pair: tuple[str, str], given: Any
) -> Entry:
    verifier, sampler = pair
    rates, steps, nodes = [], 0, 0
    for index, prompt in enumerate(prompts):
        for seed in range(given.seeds):
            out = treespec.generate(
                target,
                prompt,
                draft=draft,
                max_new_tokens=given.max_new_tokens,
                temperature=temperature,
                policy=tree,
                verifier=verifier,
                sampler=sampler,
                seed=1000 * index + seed,
                eos_token_id=(),
            )
            rates.append(out.stats.tokens_per_step)
            steps, nodes = steps + out.stats.steps, nodes + out.stats.nodes
    error = statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else 0.0
    return Entry(temperature, tree, verifier, sampler, statistics.fmean(rates), error, nodes / steps, steps)


def show(entries: list[Entry]) -> None:
    console = Console(width=110)
    for temperature, tree in dict.fromkeys((e.temperature, e.tree) for e in entries):
        table = Table(
            "verifier", "children", "tokens/step", "x naive", "nodes/step", title=f"T={temperature}, <{tree}>"
        )
        group = [e for e in entries if (e.temperature, e.tree) == (temperature, tree)]
        naive = max((e.tokens_per_step for e in group if e.verifier == "naive"), default=float("nan"))
        for e in group:
            rate = f"{e.tokens_per_step:.2f} ± {e.standard_error:.2f}"
            table.add_row(e.verifier, e.sampler, rate, f"{e.tokens_per_step / naive:.2f}", f"{e.nodes_per_step:.1f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder of a model; heldout.json lies beside it")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2, help="generations of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--verifiers", nargs="+", choices=VERIFIERS, default=list(VERIFIERS))
    parser.add_argument("--output", type=Path, default=RESULTS / "verifiers.json")
    given = parser.parse_args()
    target_model, draft_model, prompts = load_pair(given.target, given.draft, given.prompts)
    options = {"lowering": "eager"}
    target, draft = (treespec.tree_program(model, options=options) for model in (target_model, draft_model))
    entries = []
    for temperature in given.temperatures:
        for tree in (*TREES, CHAIN):
            for pair in CHAIN_PAIRS if tree == CHAIN else PAIRS:
                if pair[0] in given.verifiers:
                    entries.append(measure(target, draft, prompts, temperature, tree, pair, given))
    show(entries)
    report = {"meta": describe_run(torch.get_num_threads()), "entries": [asdict(entry) for entry in entries]}
    write_json(given.output, report)


if __name__ == "__main__":
    main()
