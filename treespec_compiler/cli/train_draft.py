"""Train a draft for a target that has none: the target answers prompts, and the draft learns to guess its answers."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..errors import InvalidOption
from ..program.tree_program import tree_program
from ..training.material import BoostPlan, DraftPlan
from ..training.progress import Milestone, Tell
from ..training.prompts import pieces, read_prompts
from ..training.run import KINDS, train_draft
from ..training.students.heads import HeadPlan
from ..training.students.small import SmallPlan
from ..training.training import TrainingPlan, describe
from ..training.writing import WritingPlan
from .arguments import MODEL, add_json, add_option, add_reading, parse_options, positive
from .inspection import quiet_torch
from .models import DTYPES, load

EPILOG = """\
examples:
  treespec train-draft smollm2 --kind eagle3 --prompts questions.jsonl --out my-head
  treespec train-draft demo --kind small --text src/*.py --out my-draft
  treespec generate --target smollm2 --draft eagle3:my-head --prompt "Why is the sky blue?"

A run that was ended goes on where it was when the same command is given again, and comes to the same bits. Texts that
the target wrote lie in DIR/data (or --data) and may be deleted afterwards. docs/drafts.md says which kind is for whom.
"""
PIECES, PIECE_TOKENS = 512, 64
DEFAULTS = (WritingPlan(), TrainingPlan(), HeadPlan(), SmallPlan(), BoostPlan())


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    writing, training, head, small, boost = DEFAULTS
    parser.add_argument("model", metavar="MODEL", help=f"the target: {MODEL}")
    parser.add_argument("--kind", choices=KINDS, default="eagle3", help="what is trained (default: eagle3)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the draft is written")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the target's texts (default: in --out)")
    asked = parser.add_argument_group("prompts (one of)").add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", metavar="FILE", type=Path, help="a prompt a line; .jsonl: JSON strings or ids")
    asked.add_argument("--text", metavar="FILE", type=Path, nargs="+", help="files whose pieces are gone on from")
    data = parser.add_argument_group("the target's texts")
    data.add_argument("--no-chat", action="store_true", help="--prompts: leave out the model's chat template")
    data.add_argument("--pieces", metavar="N", type=positive, default=PIECES, help="--text: how many (default: 512)")
    data.add_argument(
        "--piece-tokens", metavar="N", type=positive, default=PIECE_TOKENS, help="--text: of each (default: 64)"
    )
    _numbers(data, ("--new-tokens", writing.new_tokens, "of an answer at most"))
    _numbers(data, ("--at-once", writing.at_once, "answers that are written together"))
    data.add_argument("--temperature", metavar="T", type=float, default=0.0, help="of answers (default: 0)")
    steps = parser.add_argument_group("training")
    _numbers(
        steps,
        ("--steps", training.steps, "of the optimizer"),
        ("--texts", training.texts_a_step, "texts a step"),
        ("--held-out", training.held_out, "prompts that acceptance is measured on"),
        ("--evaluate-every", training.evaluate_every, "steps between two measurements"),
        ("--memory", training.memory_mb, "MB that training may hold beside the target"),
    )
    steps.add_argument("--rate", metavar="X", type=float, default=training.rate, help=f"default: {training.rate}")
    steps.add_argument("--seed", metavar="N", type=int, default=0, help="of everything that is drawn (default: 0)")
    shape = parser.add_argument_group("eagle3, parallel")
    _numbers(
        shape,
        ("--depth", head.depth, "places it learns to guess"),
        ("--vocabulary", head.vocabulary, "ids it can guess, the commonest"),
    )
    shape.add_argument("--intermediate", metavar="N", type=positive, help="width of its feed-forward part")
    shape.add_argument(
        "--taps", metavar="K,K,..", type=layers, help="layers after which it reads (default: low, middle, high)"
    )
    model = parser.add_argument_group("small, boosted")
    model.add_argument("--start", metavar="MODEL", help="a model of transformers to begin with")
    _numbers(
        model,
        ("--layers", small.layers, "of a new model"),
        ("--hidden", small.hidden, "its width"),
        ("--heads", small.heads, "its attention heads"),
        ("--members", boost.members, "boosted: models, each tuned to what those before it miss"),
        ("--sample", boost.sample, "boosted: tokens of a sample, which is left out once it is guessed"),
    )
    reading = parser.add_argument_group("the target")
    reading.add_argument("--device", default="cpu", help='where all of it runs: "cpu" (default), "cuda"')
    add_reading(reading, tiny=False)
    add_option(reading)
    add_json(parser.add_argument_group("output"), " with what was measured")


def _numbers(group: Any, *arguments: tuple[str, int, str]) -> None:
    for name, default, text in arguments:
        group.add_argument(name, metavar="N", type=positive, default=default, help=f"{text} (default: {default})")


def layers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ArgumentTypeError(f"got {text!r}, expected numbers such as 2,15,27")
    return tuple(map(int, text.split(",")))


def check_uses(arguments: Namespace) -> None:
    """Raises `InvalidOption` for an option of another kind, or of other prompts: it would be ignored."""
    _, _, head, small, boost = DEFAULTS
    of_kinds: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("eagle3", "parallel"), {"vocabulary": head.vocabulary, "intermediate": None, "taps": None}),
        (("small", "boosted"), {"start": None, "layers": small.layers, "hidden": small.hidden, "heads": small.heads}),
        (("boosted",), {"members": boost.members, "sample": boost.sample}),
    ]
    for kinds, defaults in of_kinds:
        for name, default in defaults.items():
            if arguments.kind not in kinds and getattr(arguments, name) != default:
                raise InvalidOption(name=f"--{name}", got=f"--kind {arguments.kind}", expected=" or ".join(kinds))
    others = {"no_chat": False} if arguments.prompts is None else {"pieces": PIECES, "piece_tokens": PIECE_TOKENS}
    for name, usual in others.items():
        if getattr(arguments, name) != usual:
            got, expected = ("--text", "--prompts") if arguments.prompts is None else ("--prompts", "--text")
            raise InvalidOption(name=f"--{name.replace('_', '-')}", got=got, expected=expected)


def plan_of(arguments: Namespace) -> DraftPlan:
    return DraftPlan(
        arguments.kind,
        WritingPlan(arguments.new_tokens, arguments.temperature, arguments.seed, at_once=arguments.at_once),
        TrainingPlan(
            arguments.steps,
            arguments.texts,
            arguments.rate,
            arguments.seed,
            arguments.evaluate_every,
            arguments.held_out,
            arguments.memory,
        ),
        HeadPlan(arguments.depth, arguments.vocabulary, arguments.intermediate, arguments.taps),
        SmallPlan(arguments.layers, arguments.hidden, arguments.heads, arguments.depth),
        BoostPlan(arguments.members, arguments.sample),
    )


def run(arguments: Namespace) -> int:
    quiet_torch()
    check_uses(arguments)
    plan, messages = plan_of(arguments), Console(stderr=True)
    given = {"dtype": DTYPES[arguments.dtype], "random_weights": arguments.random_weights}
    with messages.status("reading models"):
        target = load(arguments.model, **given)
        start = None if arguments.start is None else load(arguments.start, role="draft").model
        target.model.to(arguments.device)
        if arguments.prompts is not None:
            prompts = read_prompts(arguments.prompts, target.tokenizer, chat=not arguments.no_chat)
        else:
            count, tokens = arguments.pieces, arguments.piece_tokens
            prompts = pieces(arguments.text, target.tokenizer, count, tokens, arguments.seed)
        program = tree_program(target.model, options=parse_options(arguments.option))
    with bars(messages) as tell:
        measured = train_draft(
            program,
            prompts,
            arguments.out,
            plan,
            data=arguments.data,
            start=start,
            tokenizer=target.tokenizer,
            tell=tell,
        )
    first, last = measured[0], measured[-1]
    if arguments.json:
        curve = [[each.step, each.held_out.tokens_per_step] for each in measured]
        depths = list(last.held_out.by_depth)
        print(json.dumps({"out": str(arguments.out), "tokens_per_step": curve, "by_depth": depths}))
    else:
        print(f"{arguments.out}: {describe(last)}; {first.held_out.tokens_per_step:.2f} before training")
    return 0


@contextmanager
def bars(console: Console) -> Iterator[Tell]:
    """A bar a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("{task.fields[note]}", markup=False)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, note, console=console, disable=not console.is_terminal) as progress:

        def tell(told: Milestone) -> None:
            if told.stage not in tasks:
                tasks[told.stage] = progress.add_task(told.stage, total=told.total, note="")
            progress.update(tasks[told.stage], completed=told.done, total=told.total, note=told.note)

        yield tell
