"""Tokens per step of greedy tree speculation with the demo pair, by simulation on the held-out prompts.

    PYTHONPATH=. python examples/demo_pair/agreement.py

A step verifies a tree of 8 nodes: the known next token (root) and 7 speculated ones. It accepts the longest path that
is also the target's greedy text, and yields the accepted nodes + 1 token (the target's own). A static tree accepts a
node exactly when the ranks of the greedy tokens in the draft's distributions spell one of its paths, and these
distributions are those on the greedy text itself: one teacher-forced draft run per prompt is enough.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Ranks = tuple[int, ...]  # ranks of the nodes from the root's child down


def expansion(*widths: int) -> frozenset[Ranks]:
    """<k1, .., km>: every node of level i has k(i+1) children."""
    levels: list[list[Ranks]] = [[()]]
    for width in widths:
        levels.append([(*path, rank) for path in levels[-1] for rank in range(width)])
    return frozenset(path for level in levels[1:] for path in level)


def chain(length: int, *, first: int = 0) -> frozenset[Ranks]:
    """`length` nodes: the draft's token number `first`, then its best tokens."""
    return frozenset((first, *[0] * depth) for depth in range(length))


SHAPES: dict[str, frozenset[Ranks]] = {
    "chain of 7": chain(7),
    "chain of 6 + 2nd child": chain(6) | {(1,)},
    "chain of 5 + 2nd child at depths 1, 2": chain(5) | {(1,), (0, 1)},
    "chain of 4 + 2nd child at depths 1, 2, 3": chain(4) | {(1,), (0, 1), (0, 0, 1)},
    "chains of 5 and 2": chain(5) | chain(2, first=1),
    "chains of 4 and 2 + 3rd child": chain(4) | chain(2, first=1) | {(2,)},
    "<2,1,1> + 1": expansion(2, 1, 1) | chain(4),
    "<2,2> + 1": expansion(2, 2) | chain(3),
    "<3,1> + 1": expansion(3, 1) | chain(3),
}


@dataclass(frozen=True)
class Run:
    ranks: list[int]  # ranks[i]: rank of greedy token i+1 in the draft's distribution after greedy token i
    prompt: Tensor  # [1, P]
    greedy: Tensor  # [G]


@torch.no_grad()
def greedy_texts(target: PreTrainedModel, prompts: list[Tensor], new_tokens: int) -> list[Tensor]:
    """Prompts [1, P] -> prompt and greedy continuation [1, P + G]; G < new_tokens where the target ends the text."""
    return [
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        for ids in prompts
    ]


@torch.no_grad()
def runs(draft: PreTrainedModel, prompts: list[Tensor], texts: list[Tensor]) -> list[Run]:
    """The draft's rank of each greedy token."""
    found = []
    for ids, full in zip(prompts, texts, strict=True):
        greedy = full[0, ids.shape[1] :]
        logits = draft(full).logits[0, ids.shape[1] : -1]  # [G-1, V], after greedy token i
        own = logits.gather(1, greedy[1:, None])
        found.append(Run((logits > own).sum(1).tolist(), ids, greedy))
    return found


def static_steps(ranks: list[int], tree: frozenset[Ranks]) -> tuple[int, int]:
    """(tokens, steps) until the greedy text is used up; the last step counts the tokens it could still use."""
    at = tokens = steps = 0
    while at < len(ranks):
        depth = 0
        while at + depth < len(ranks) and tuple(ranks[at : at + depth + 1]) in tree:
            depth += 1
        gained = min(depth + 1, len(ranks) - at)
        at, tokens, steps = at + gained, tokens + gained, steps + 1
    return tokens, steps


@torch.no_grad()
def best_first_tree(draft: PreTrainedModel, context: Tensor, nodes: int, width: int = 3) -> list[tuple[int, ...]]:
    """The `nodes` token paths of highest draft probability after `context` [1, C]; paths as token ids."""
    frontier: dict[tuple[int, ...], float] = {}
    chosen: list[tuple[int, ...]] = []
    path, score = (), 0.0
    while True:
        tail = torch.tensor([path], dtype=torch.long)
        logp = draft(torch.cat([context, tail], 1), logits_to_keep=1).logits[0, -1].log_softmax(-1)
        top = logp.topk(width)
        frontier |= {(*path, t): score + v for v, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
        path = max(frontier, key=frontier.__getitem__)
        score = frontier.pop(path)
        chosen.append(path)
        if len(chosen) == nodes:
            return chosen


def best_first_steps(draft: PreTrainedModel, run: Run, nodes: int) -> tuple[int, int]:
    greedy = run.greedy.tolist()
    at, tokens, steps = 0, 0, 0
    while at < len(greedy) - 1:
        context = torch.cat([run.prompt, run.greedy[None, : at + 1]], 1)
        tree = set(best_first_tree(draft, context, nodes))
        depth = 0
        while tuple(greedy[at + 1 : at + 2 + depth]) in tree and at + 1 + depth < len(greedy):
            depth += 1
        gained = min(depth + 1, len(greedy) - 1 - at)
        at, tokens, steps = at + gained, tokens + gained, steps + 1
    return tokens, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=Path, default=Path(__file__).parents[2] / "treespec_compiler" / "demo")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=None, help="use the first N only")
    parser.add_argument("--no-best-first", action="store_true")
    parser.add_argument("--texts", type=Path, help="keep the target's greedy texts here, or read them")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(args.pair / "target", dtype=torch.float32).eval()
    draft = AutoModelForCausalLM.from_pretrained(args.pair / "draft", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "target")
    items = json.loads((args.pair / "heldout.json").read_text())[: args.prompts]
    prompts = [tokenizer(item["text"], return_tensors="pt")["input_ids"] for item in items]
    if args.texts and args.texts.exists():
        texts = torch.load(args.texts, weights_only=True)
    else:
        texts = greedy_texts(target, prompts, args.new_tokens)
    if args.texts:
        torch.save(texts, args.texts)
    done = runs(draft, prompts, texts)

    table = Table(title=f"{len(done)} held-out prompts, {sum(len(r.greedy) for r in done)} greedy tokens, 8-node trees")
    for column in ("tree", "tokens / step", "worst prompt", "best prompt"):
        table.add_column(column)
    figures: dict[str, float] = {}

    def add(name: str, counts: list[tuple[int, int]]) -> None:
        each = [tokens / steps for tokens, steps in counts if steps]
        figures[name] = sum(t for t, _ in counts) / sum(s for _, s in counts)
        table.add_row(name, f"{figures[name]:.2f}", f"{min(each):.2f}", f"{max(each):.2f}")

    for name, tree in SHAPES.items():
        assert len(tree) == 7, name
        add(name, [static_steps(run.ranks, tree) for run in done])
    if not args.no_best_first:
        add("best-first (dynamic)", [best_first_steps(draft, run, 7) for run in done])
    ranks = torch.tensor([rank for run in done for rank in run.ranks])
    for k in (1, 2, 3):
        figures[f"greedy token in draft top-{k}"] = (ranks < k).float().mean().item()
    console = Console()
    console.print(table)
    console.print({name: round(value, 3) for name, value in figures.items() if "top-" in name})
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
