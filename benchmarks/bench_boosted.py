"""Several small models, each tuned to what those before it miss, or one of them with a wider tree of as many nodes?

    python benchmarks/bench_boosted.py --work build/boosted      # trains three members for the demo pair's target first
    python benchmarks/bench_boosted.py --show benchmarks/results/cpu/boosted.json --markdown

SpecInfer (Miao et al., arXiv 2305.09781, section 3) tunes its small models one after the other and merges their trees.
Each of N members proposes a chain of `--depth` tokens; the one beside them is the first member, which learned from
everything, with a tree that branches N times at the root: as many nodes, and N times fewer models. Greedy; tokens per
step count the target's own token. The members learn from pieces of the standard library that the target goes on from;
prompts are of modules that were held out from that.
"""

from __future__ import annotations

import argparse
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Quartiles, Table, describe_run, load_pair, progress, read_report, show, write_json

import treespec_compiler as treespec
from treespec_compiler import demo
from treespec_compiler.training.material import BoostPlan, DraftPlan
from treespec_compiler.training.progress import Milestone
from treespec_compiler.training.prompts import pieces
from treespec_compiler.training.run import train_draft
from treespec_compiler.training.students.small import SmallPlan
from treespec_compiler.training.training import TrainingPlan
from treespec_compiler.training.writing import WritingPlan

NAME = "boosted"
PIECE_TOKENS = 48


@dataclass(frozen=True)
class Entry:
    """What one way of spending nodes gives, over all prompts."""

    models: int
    tree: str
    """Of each model."""
    nodes: float
    """A step, the root left out."""
    tokens_per_step: float
    by_prompt: list[float]


def library() -> list[Path]:
    """Modules that no prompt is of."""
    held_out = {prompt.module for prompt in demo.heldout_prompts()}
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(root.glob("*.py")) if path.stem not in held_out]


def trained(program: Any, tokenizer: Any, given: argparse.Namespace) -> list[Path]:
    """Folders of the members, trained where they are not there."""
    plan = DraftPlan(
        "boosted",
        WritingPlan(new_tokens=given.text_tokens),
        TrainingPlan(steps=given.steps, rate=2e-3, evaluate_every=max(1, given.steps // 4), seed=given.seed),
        small=SmallPlan(layers=given.layers, hidden=given.hidden),
        boost=BoostPlan(given.members, given.sample),
    )
    prompts = pieces(library(), tokenizer, given.pieces, PIECE_TOKENS, given.seed)
    with progress(0) as say:

        def tell(said: Milestone) -> None:
            if said.done == said.total or said.done % 50 == 0:
                say(f"{said.stage}: {said.done} of {said.total} {said.note}")

        train_draft(program, prompts, given.work, plan, tell=tell)
    return [given.work / f"member-{number + 1}" for number in range(given.members)]


def measure(target: Any, drafts: list[Any], tree: str, prompts: list[list[int]], given: argparse.Namespace) -> Entry:
    tokens = steps = nodes = 0.0
    each = []
    for prompt in prompts:
        out = treespec.generate(target, prompt, draft=drafts, policy=tree, max_new_tokens=given.max_new_tokens)
        tokens += out.stats.step_tokens
        steps += out.stats.steps
        nodes += (out.stats.nodes_per_step - 1) * out.stats.steps
        each.append(out.stats.tokens_per_step)
    return Entry(len(drafts), tree, nodes / max(1, steps), tokens / max(1, steps), each)


def tables(report: dict[str, Any]) -> list[Table]:
    found = Table("Tokens per step, greedy", ["models", "tree of each", "nodes a step", "tokens a step", "by prompt"])
    for entry in report["entries"]:
        spread = Quartiles.of(entry["by_prompt"])
        cells = (f"{entry['nodes']:.1f}", f"{entry['tokens_per_step']:.3f}", f"{spread:.2f}")
        found.add(str(entry["models"]), entry["tree"], *cells)
    return [found]


def notes(report: dict[str, Any]) -> list[str]:
    training = report["training"]
    return [
        f"Members of {training['layers']} layers, {training['hidden']} wide, {training['steps']} steps each, on "
        f"{training['pieces']} texts; samples of {training['sample']} tokens. Merged trees share equal nodes."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/boosted"), help="where members are trained or lie")
    parser.add_argument(
        "--target", type=Path, help="a folder of a model; heldout.json lies beside it (default: the demo's)"
    )
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of the optimizer, for each member")
    parser.add_argument("--pieces", type=int, default=400, help="texts that the target writes")
    parser.add_argument("--text-tokens", type=int, default=64, help="of each")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--sample", type=int, default=3)
    parser.add_argument("--depth", type=int, default=3, help="of the trees")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "boosted.json")
    parser.add_argument("--show", type=Path, help="print this file's tables and measure nothing")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.show:
        report = read_report(given.show, "entries", "training", benchmark=NAME)
        show(tables(report), notes(report), given.markdown)
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, _, prompts = load_pair(given.target, given.target, given.prompts)
    tokenizer = AutoTokenizer.from_pretrained(given.target or demo.paths.target)
    options = {"lowering": "eager"}
    target = treespec.tree_program(model, options=options)
    places = trained(target, tokenizer, given)
    loaded = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]
    members = [treespec.tree_program(each, options=options) for each in loaded]
    chain = ["1"] * (given.depth - 1)
    entries = []
    for count in range(1, given.members + 1):
        entries.append(measure(target, members[:count], ",".join(["1", *chain]), prompts, given))
        if count > 1:
            entries.append(measure(target, members[:1], ",".join([str(count), *chain]), prompts, given))
    report = {
        "benchmark": NAME,
        "meta": describe_run(torch.get_num_threads()),
        "target": "demo" if given.target is None else given.target.name,
        "training": {key: getattr(given, key) for key in ("members", "steps", "pieces", "text_tokens", "layers")}
        | {key: getattr(given, key) for key in ("hidden", "sample", "seed")},
        "entries": [asdict(entry) for entry in entries],
    }
    write_json(given.output, report)
    show(tables(report), notes(report), given.markdown)


if __name__ == "__main__":
    main()
