"""Tree policies on the demo pair: tokens, nodes and milliseconds of a step, and speed over plain decoding.

    python benchmarks/bench_policies.py                       # writes results/cpu/policies.json and policies.svg
    python benchmarks/bench_policies.py --quick --clock cpu   # a busy machine: CPU seconds of one thread

Beside every policy stands the chain of equal budget: with as many nodes as the policy verified in a step on average.
Above temperature 0, each is run with every verifier (on a chain, traversal, the default, is block verification).
`useless` is a draft with random weights. Acceptance tables are those of SpecInfer (arXiv 2305.09781), Tables 1 and 2:
the chance that the target's token is among the draft's top k, and the tokens a step with trees <1,1,k,1,1,1,1,1>.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Table, describe_run, load_pair, progress, settle, show, write_json
from policy_pictures import picture

import treespec_compiler as treespec
from treespec_compiler import demo
from treespec_compiler.program.early_exit import ExitHead
from treespec_compiler.speculation.cost import acceptance
from treespec_compiler.speculation.cost.latency import latency
from treespec_compiler.speculation.drafts.early_exit import EarlyExitDraft
from treespec_compiler.speculation.policies.fixed import FixedTree
from treespec_compiler.speculation.policies.sequoia import fastest_tree, greedy_nodes

RANKS, DEPTHS = 5, 4


@dataclass
class Entry:
    """Sums over all prompts of one policy, draft and temperature."""

    policy: str
    draft: str
    temperature: float
    verifier: str
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    nodes: int = 0
    step_seconds: float = 0.0
    draft_seconds: float = 0.0
    speed: float = 0.0
    """Tokens a second over those of plain decoding, prompts included."""

    def add(self, seconds: float, stats: Any) -> None:
        self.seconds += seconds
        self.tokens += stats.tokens
        self.steps += stats.steps
        self.step_tokens += stats.step_tokens
        self.nodes += stats.nodes
        self.step_seconds += stats.step_seconds
        self.draft_seconds += stats.draft_seconds

    @property
    def tokens_per_step(self) -> float:
        return self.step_tokens / max(1, self.steps)

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / max(1, self.steps)


@dataclass(frozen=True)
class Arm:
    name: str
    policy: Any
    draft: str
    verifier: str | None = None


class Bench:
    """Models, prompts and how a request is timed."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.clock: Callable[[], float] = time.process_time if given.clock == "cpu" else time.perf_counter
        target, draft, self.prompts = load_pair(given.target, given.draft, given.prompts)
        options = {"lowering": given.lowering}
        torch.manual_seed(0)
        useless = type(draft)(draft.config).eval()
        self.target = treespec.tree_program(target, options=options)
        small = treespec.tree_program(draft, options=options)
        self.models = [target, draft, useless]  # programs hold their modules weakly
        self.drafts: dict[str, Any] = {
            "none": None,
            "model": small,
            "useless": treespec.tree_program(useless, options=options),
            "ngram": "ngram",
            "model + ngram": [small, "ngram"],
        }
        exit_file = (given.target.parent if given.target else demo.paths.root) / "early_exit.safetensors"
        if exit_file.is_file():
            head = ExitHead.load(exit_file)
            self.drafts["early exit"] = EarlyExitDraft(self.target, head.layer, head)

    def request(self, arm: Arm, prompt: list[int], temperature: float, seed: int = 0) -> tuple[float, Any]:
        torch.manual_seed(seed)  # not `seed=`: then "auto" would start from nothing in every request
        began = self.clock()
        steps = treespec.stream(
            self.target,
            prompt,
            draft=self.drafts[arm.draft],
            policy=arm.policy,
            verifier=arm.verifier,
            max_new_tokens=self.given.max_new_tokens,
            temperature=temperature,
            eos_token_id=(),
        )
        seen = list(steps)
        return self.clock() - began, (steps.stats, seen)

    def compare(self, arms: Sequence[Arm], temperature: float) -> list[Entry]:
        """Every arm on every prompt, interleaved. Greedily the median of the repeats counts; sampling draws anew in
        each repeat, and all count: the fastest would be the luckiest sample."""
        entries = {arm: Entry(arm.name, arm.draft, temperature, arm.verifier or "default") for arm in arms}
        for arm in arms:
            self.request(arm, self.prompts[0][:32], temperature)  # compiles, measures
        acceptance.forget()
        repeats = self.given.repeats
        for number, prompt in enumerate(self.prompts):
            runs: dict[Arm, list[tuple[float, Any]]] = {arm: [] for arm in arms}
            for repeat in range(repeats):
                for arm in arms if repeat % 2 == 0 else arms[::-1]:
                    seconds, (stats, _) = self.request(arm, prompt, temperature, number * repeats + repeat)
                    runs[arm].append((seconds, stats))
            for arm, found in runs.items():
                if not temperature:
                    found = [sorted(found, key=lambda run: run[0])[repeats // 2]]
                for seconds, stats in found:
                    entries[arm].add(seconds, stats)
        plain = next(e for e in entries.values() if e.draft == "none")
        for entry in entries.values():
            entry.speed = entry.tokens / entry.seconds / (plain.tokens / plain.seconds)
        return list(entries.values())

    def rates(self, draft: str, policy: str, temperature: float) -> list[list[float | None]]:
        """Accepted given that the parent was, [depth][rank]."""
        tried = [[0] * RANKS for _ in range(DEPTHS)]
        won = [[0] * RANKS for _ in range(DEPTHS)]
        arm = Arm(policy, policy, draft, "naive" if temperature else None)
        for number, prompt in enumerate(self.prompts):
            for step in self.request(arm, prompt, temperature, number)[1][1]:
                if step.tree is None:
                    continue
                on_path = set(step.path)
                for parent in step.path:
                    for rank, child in enumerate(step.tree.children(parent)):
                        depth = step.tree.depths[child] - 1
                        if depth < DEPTHS and rank < RANKS:
                            tried[depth][rank] += 1
                            won[depth][rank] += child in on_path
        return [[w / t if t else None for w, t in zip(ws, ts)] for ws, ts in zip(won, tried)]


def planned(bench: Bench, rates: Sequence[float]) -> Any:
    """Sequoia's tree by measured acceptance and measured latency."""
    target, draft = latency(bench.target), latency(bench.drafts["model"])
    plain = target.seconds(1, 256)

    def seconds(nodes: int, rows: Sequence[int]) -> float:
        return target.seconds(nodes, 256) + sum(draft.seconds(n, 256) for n in rows) + 0.05 * plain * (nodes > 1)

    return fastest_tree(rates, seconds, 24, 8)


def table(entries: Sequence[Entry], temperature: float, clock: str) -> Table:
    unit = "CPU ms/step" if clock == "cpu" else "ms/step"
    headings = ("policy", "draft", "verifier", "tokens/step", "nodes/step", unit, "tokens/s", "x plain")
    out = Table(f"temperature {temperature:g}", headings)
    fastest = max(entries, key=lambda e: e.speed)
    for e in entries:
        ms = 1e3 * (e.seconds if clock == "cpu" else e.step_seconds) / max(1, e.steps)
        figures = (f"{e.tokens_per_step:.2f}", f"{e.nodes_per_step:.1f}", f"{ms:.2f}", f"{e.tokens / e.seconds:.0f}")
        out.add(e.policy, e.draft, e.verifier, *figures, f"{e.speed:.2f}", bold=e is fastest)
    return out


def acceptance_tables(
    bench: Bench, temperatures: Sequence[float], say: Callable[[str], None]
) -> tuple[list[Table], Any]:
    """SpecInfer's Tables 1 and 2."""
    first = Table(
        "Table 1: the target's token is among the draft's top k", ("decoding", *(f"k={k}" for k in range(1, 6)))
    )
    second = Table("Table 2: tokens/step of <1,1,k,1,1,1,1,1>", ("decoding", *(f"k={k}" for k in range(1, 6))))
    data: dict[str, Any] = {}
    for temperature in temperatures:
        name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        say(f"acceptance, {name}")
        row = bench.rates("model", "5", temperature)[0]
        within = [sum(r or 0.0 for r in row[:k]) for k in range(1, 6)]
        widths = []
        for k in range(1, 6):
            arm = Arm("", f"1,1,{k},1,1,1,1,1", "model", "naive" if temperature else None)
            runs = [bench.request(arm, p, temperature, i)[1][0] for i, p in enumerate(bench.prompts)]
            widths.append(sum(s.step_tokens for s in runs) / sum(s.steps for s in runs))
        first.add(name, *(f"{100 * rate:.0f} %" for rate in within))
        second.add(name, *(f"{rate:.2f}" for rate in widths))
        data[name] = {"top_k": within, "width": widths}
    return [first, second], data


def arms_for(given: argparse.Namespace, tree: Any, drafts: Sequence[str]) -> list[Arm]:
    arms = [Arm("plain", None, "none"), Arm("auto", "auto", "model"), Arm("auto", "auto", "useless")]
    arms += [Arm("auto", "auto", d) for d in ("ngram", "model + ngram", "early exit") if d in drafts]
    shapes = ["1,1,3"] if given.quick else ["1,1,3", "2,2,1", "1,1,5,1"]
    arms += [Arm(f"<{shape}>", shape, "model") for shape in shapes]
    arms += [Arm(f"sequoia, {tree.max_nodes} nodes", tree, "model")] if tree.max_nodes > 1 else []
    for policy in ("best-first:8", "equal-growth:2,4"):
        arms.append(Arm(policy, policy, "model"))
    arms.append(Arm("chain:4", "chain:4", "ngram"))
    return arms


def with_verifiers(arms: Sequence[Arm], verifiers: Sequence[str]) -> list[Arm]:
    """The model draft's arms once more with each verifier."""
    return [replace(arm, verifier=verifier) for arm in arms if arm.draft == "model" for verifier in verifiers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder of a model; heldout.json lies beside it")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument(
        "--verifiers",
        nargs="+",
        default=["multi-step", "recursive", "naive"],
        help="at temperatures > 0, for every policy beside the default, traversal",
    )
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, one thread")
    parser.add_argument("--quick", action="store_true", help="fewer policies and verifiers")
    parser.add_argument("--output", type=Path, default=RESULTS / "policies.json")
    given = parser.parse_args()
    if given.clock == "cpu":
        torch.set_num_threads(1)
    with progress(3 + 2 * len(given.temperatures)) as say:
        say("compiling")
        bench = Bench(given)
        settle()
        say("acceptance by depth and rank")
        grids = {
            f"temperature {t:g}": bench.rates("model", "4,3,2,1", t)
            for t in dict.fromkeys((0.0, given.temperatures[-1]))
        }
        rates = [rate or 0.0 for rate in grids["temperature 0"][0]]
        plan = planned(bench, rates)
        tables, entries = [], []
        for temperature in given.temperatures:
            say(f"policies, temperature {temperature:g}")
            arms = arms_for(given, plan.tree, list(bench.drafts))
            verifiers = given.verifiers if temperature and not given.quick else []
            found = bench.compare(arms + with_verifiers(arms, verifiers), temperature)
            verified = {round(e.nodes_per_step) for e in found if e.draft == "model" and e.verifier == "default"}
            budgets = sorted(nodes - 1 for nodes in verified if nodes > 1)
            chains = [arms[0], *(Arm(f"chain:{d}, equal budget", f"chain:{d}", "model") for d in budgets)]
            found += bench.compare(chains + with_verifiers(chains, verifiers), temperature)[1:]
            tables.append(table(found, temperature, given.clock))
            entries += found
        more, data = acceptance_tables(bench, list(dict.fromkeys((0.0, given.temperatures[-1]))), say)
        tables += more
    order = greedy_nodes([min(rates[: k + 1]) for k in range(len(rates))], 16, 6)
    trees = {
        f"{nodes} nodes": FixedTree.of([(parent, rank) for parent, rank, _, _ in order[: nodes - 1]]).parents
        for nodes in (4, 8, 16)
    }
    trees["fastest here"] = plan.tree.parents
    report = {
        "meta": describe_run(torch.get_num_threads()),
        "arguments": {k: str(v) for k, v in vars(given).items() if k != "output"},
        "entries": [
            asdict(e) | {"tokens_per_step": e.tokens_per_step, "nodes_per_step": e.nodes_per_step} for e in entries
        ],
        "acceptance": grids,
        "tables": data,
        "trees": trees,
    }
    write_json(given.output, report)
    svg = picture("Demo pair: acceptance given the parent's, and Sequoia's trees", grids, trees)
    given.output.with_suffix(".svg").write_text(svg, encoding="utf-8")
    show(tables, [f"Sequoia's fastest tree: {plan.tokens:.2f} tokens a step expected.", f"Written: {given.output}"])


if __name__ == "__main__":
    main()
