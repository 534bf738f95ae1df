"""Complete a prompt by speculation: what the target alone would have written, or a sample from its distribution."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from ..runtime.generate import Step, stream
from ..speculation.policies.named import as_policy
from ..speculation.policies.static import StaticExpansion
from .arguments import (
    MODEL,
    add_json,
    add_offload,
    add_option,
    add_prompt_arguments,
    add_reading,
    parse_options,
    positive,
    with_offload,
)
from .folders import read_models
from .models import LoadedModel
from .ranks import follows, is_rank, quiet_followers, start_ranks, together
from .text import TextStream, read_prompt
from .waiting import waiting

EPILOG = """\
examples:
  treespec generate --target demo --draft demo --prompt "def main():" --stream
  treespec generate --target hf:PATH --draft hf:PATH --prompt-file prompt.txt --expansion 1,1,3 --json
  treespec generate --target py:mypackage.models:build --prompt-ids 1,2,3 --option lowering=eager
  treespec generate --target smollm2 --mesh tp=3 --prompt "def main():"
  treespec generate FOLDER --prompt "def main():"         (which `treespec compile` wrote)
  treespec generate --target hf:PATH --offload disk --resident-gb 2 --draft suffix --prompt-file prompt.txt
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    models = parser.add_argument_group(f"models ({MODEL})")
    wanted = models.add_mutually_exclusive_group(required=True)
    wanted.add_argument("folder", metavar="FOLDER", nargs="?", help="a compiled folder, which brings its drafts")
    wanted.add_argument("--target", metavar="MODEL", help="the model whose output is wanted, or a compiled folder")
    models.add_argument(
        "--draft",
        metavar="DRAFT",
        action="append",
        default=[],
        help="what guesses: a smaller model, ngram, suffix, recycle, early-exit, early-exit:K (layers), a trained head "
        "(early-exit:FILE.safetensors, eagle3:DIR, parallel:DIR, medusa:DIR); may be "
        "repeated; left out: no speculation, or what a compiled folder brings; none: without",
    )
    add_reading(models, tiny=False)
    add_prompt_arguments(parser)
    run_options = parser.add_argument_group("generation")
    run_options.add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: 128")
    run_options.add_argument(
        "--expansion",
        metavar="K1,K2,..",
        help="children that each node of a level gets; short for --policy",
    )
    run_options.add_argument(
        "--policy", default="auto", help='"auto" (default), "1,1,3", "chain:4", "best-first:12" or "equal-growth:2,4"'
    )
    run_options.add_argument("--ignore-eos", action="store_true", help="do not end at the model's end-of-text token")
    run_options.add_argument(
        "--mesh", metavar="MESH", help="run on several ranks, such as tp=2,pp=2; they are started here"
    )
    add_offload(run_options)
    add_option(run_options)
    sampling = parser.add_argument_group("sampling (docs/verification.md)")
    sampling.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (default): the likeliest token"
    )
    sampling.add_argument("--top-k", metavar="N", type=int)
    sampling.add_argument("--top-p", metavar="P", type=float)
    sampling.add_argument("--min-p", metavar="P", type=float)
    sampling.add_argument("--repetition-penalty", metavar="X", type=float, help="default: the model's own")
    sampling.add_argument("--seed", metavar="N", type=int, help="gives the same output again")
    sampling.add_argument("--verifier", help="traversal (default), multi-step, recursive, naive or block")
    sampling.add_argument("--sampler", help="children of the draft: without-replacement, iid or top-k")
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print tokens as they are accepted")
    add_json(output, " with ids, text and statistics (with --stream: a line for every step before it)")


def run(arguments: Namespace) -> int:
    options = with_offload(parse_options(arguments.option), arguments)
    if arguments.mesh is not None:
        options = replace(options, mesh=arguments.mesh)
    if options.ranks > 1:
        if not is_rank():
            return start_ranks(options.ranks)
        quiet_followers()
    policy = StaticExpansion.parse(arguments.expansion) if arguments.expansion else as_policy(arguments.policy)
    messages = Console(stderr=True, quiet=follows())
    with messages.status("reading models"):
        target, drafts = together(options.shape, lambda: read_models(arguments, arguments.folder or arguments.target))
        prompt = read_prompt(arguments, target)
        tokenizers = [draft.tokenizer for draft in drafts if draft.tokenizer is not None]
    with waiting(messages, target.name):
        steps = stream(
            target.model,
            prompt,
            draft=[draft.model for draft in drafts] or None,
            max_new_tokens=arguments.max_new_tokens,
            policy=policy,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            verifier=arguments.verifier,
            sampler=arguments.sampler,
            eos_token_id=() if arguments.ignore_eos else None,
            options=options,
            tokenizer=target.tokenizer,
            draft_tokenizer=tokenizers[0] if tokenizers else None,
        )
    printer = (JsonPrinter if arguments.json else TextPrinter)(target, live=arguments.stream)
    for step in steps:
        printer.step(step)
    printer.end(steps.tokens, steps.stats.as_dict())
    if not arguments.json:
        messages.print(str(steps.stats), style="dim", highlight=False, markup=False, soft_wrap=True)
    return 0


class TextPrinter:
    """The completion on stdout; on a terminal, tokens the draft had guessed are green."""

    def __init__(self, target: LoadedModel, live: bool) -> None:
        self.text = TextStream(target.tokenizer)
        self.live = live
        self.console = Console(soft_wrap=True, highlight=False)

    def step(self, step: Step) -> None:
        for ids, style in ((step.tokens[: step.accepted], "green"), (step.tokens[step.accepted :], "")):
            self.show(self.text.push(ids), style)

    def show(self, piece: str, style: str = "") -> None:
        if not self.live or not piece:
            return
        if self.console.is_terminal:
            self.console.print(Text(piece, style), end="")
        else:
            sys.stdout.write(piece)
        sys.stdout.flush()

    def end(self, tokens: list[int], stats: dict[str, Any]) -> None:
        self.show(self.text.finish())
        print("" if self.live else self.text.shown)


class JsonPrinter:
    """JSON on stdout: a line a step if live, and a last object with everything."""

    def __init__(self, target: LoadedModel, live: bool) -> None:
        self.target = target
        self.live = live

    def step(self, step: Step) -> None:
        if self.live:
            tree = step.tree and {"tokens": step.tree.tokens, "parents": step.tree.parents}
            record = {"tokens": step.tokens, "accepted": step.accepted, "tree": tree, "path": step.path}
            print(json.dumps(record), flush=True)

    def end(self, tokens: list[int], stats: dict[str, Any]) -> None:
        text = None
        if self.target.tokenizer is not None:
            decoder = TextStream(self.target.tokenizer)
            text = decoder.push(tokens) + decoder.finish()
        record = {"target": self.target.name, "ids": tokens, "text": text, "stats": stats}
        print(json.dumps(record, indent=None if self.live else 2))
