"""Complete held-out code with the shipped pair of models, show a verified tree, and measure against plain decoding."""

from __future__ import annotations

import functools
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import demo
from ..options import Options
from ..runtime.generate import Step, Stream, stream
from ..speculation.policies.static import StaticExpansion
from .arguments import add_option, parse_options, positive
from .baselines import HuggingFaceGenerate, StaticCacheLoop
from .models import load
from .text import TextStream

EPILOG = """\
examples:
  treespec demo
  treespec demo --prompts 8 --max-new-tokens 128 --expansion 1,2,2
"""

Loop = Callable[[Tensor, int], tuple[list[int], float]]
"""(prompt [1, S], new tokens) -> the new ids and the seconds from the prompt to the last of them."""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--prompts", metavar="N", type=positive, default=4, help="held-out prompts (default: 4)")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=96, help="for each (default: 96)")
    parser.add_argument("--expansion", metavar="K1,K2,..", default="1,1,3", help="shape of the trees (default: 1,1,3)")
    add_option(parser)


@dataclass
class TimedLoop:
    """One loop's runs over all prompts."""

    name: str
    run: Loop
    ids: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def measure(self, prompt: Tensor, new_tokens: int) -> None:
        ids, seconds = self.run(prompt, new_tokens)
        self.ids.append(ids)
        self.seconds.append(seconds)

    @property
    def rate(self) -> float:
        """Median tokens per second; the pass over the prompt counts."""
        return statistics.median(len(ids) / seconds for ids, seconds in zip(self.ids, self.seconds, strict=True))


@dataclass
class Speculation:
    """treespec as a loop, keeping the statistics of every run."""

    target: Any
    draft: Any
    policy: StaticExpansion
    options: Options
    runs: list[Stream] = field(default_factory=list)

    def start(self, prompt: Tensor, new_tokens: int) -> Stream:
        return stream(
            self.target,
            prompt,
            draft=self.draft,
            max_new_tokens=new_tokens,
            policy=self.policy,
            eos_token_id=(),
            options=self.options,
        )

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        began = perf_counter()
        steps = self.start(prompt, new_tokens)
        for _ in steps:
            pass
        seconds = perf_counter() - began
        self.runs.append(steps)
        return steps.tokens, seconds

    @property
    def tokens_per_step(self) -> float:
        return sum(run.stats.step_tokens for run in self.runs) / max(1, sum(run.stats.steps for run in self.runs))


def run(arguments: Namespace) -> int:
    options, policy = parse_options(arguments.option), StaticExpansion.parse(arguments.expansion)
    new_tokens = arguments.max_new_tokens
    console = Console(highlight=False)
    began = perf_counter()

    with progress(console) as say:
        say("reading the models")
        target, draft = load("demo"), load("demo", role="draft")
        held_out = demo.heldout_prompts()
        held_out = held_out[:: max(1, len(held_out) // arguments.prompts)][: arguments.prompts]
        tokenizer: Any = target.tokenizer
        prompts = [torch.tensor([tokenizer.encode(item.text)]) for item in held_out]
        longest = max(prompt.shape[1] for prompt in prompts)

        speculation = Speculation(target.model, draft.model, policy, options)
        static = StaticCacheLoop(target.model, longest + new_tokens)
        rows = [
            TimedLoop(HuggingFaceGenerate.name, HuggingFaceGenerate(target.model)),
            TimedLoop(StaticCacheLoop.name, static),
            TimedLoop("treespec", speculation),
        ]
        say("compiling target and draft with treespec")
        speculation(prompts[0], 8)
        compile_seconds = speculation.runs.pop().stats.compile_seconds
        say("compiling the static-cache loop")
        static(prompts[0], 4)
        rows[0].run(prompts[0], 4)
    console.print(f"ready after {perf_counter() - began:.0f} s ({compile_seconds:.0f} s of it treespec compiling)")

    first = held_out[0]
    console.rule(f"[bold]{first.module}[/bold], line {first.line}: held out from training")
    steps = show_completion(console, tokenizer, first.text, speculation.start(prompts[0], new_tokens))
    console.print()
    show_tree(console, tokenizer, steps)

    with progress(console) as say:
        for count, prompt in enumerate(prompts, 1):
            say(f"measuring, prompt {count} of {len(prompts)}")
            for row in rows:  # interleaved: a disturbance hits all of them
                row.measure(prompt, new_tokens)
    show_table(console, rows, speculation, len(prompts), new_tokens)
    return 0 if all(row.ids == rows[0].ids for row in rows) else 1


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A spinner with a changing text; one line for each text where there is no terminal."""
    if not console.is_terminal:
        yield lambda text: console.print(f"{text} ...")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield functools.partial(_describe, bar, task)


def _describe(bar: Progress, task: Any, text: str) -> None:
    bar.update(task, description=text)


def show_completion(console: Console, tokenizer: Any, prompt: str, steps: Stream) -> list[Step]:
    """The prompt's end, then the completion as it comes: what the draft had guessed, and the target's bonus tokens."""
    plain = console.color_system is None
    legend = Text("guessed by the draft: ")
    legend.append("«like this»" if plain else "like this", "" if plain else "green")
    legend.append("; the target's own: ")
    legend.append("like this", "" if plain else "bold yellow")
    console.print(legend)
    console.print(Text("\n".join(prompt.rstrip("\n").splitlines()[-6:]), "dim"))
    text, seen = TextStream(tokenizer), []
    out = functools.partial(console.print, end="", soft_wrap=True)
    for step in steps:
        seen.append(step)
        accepted = text.push(step.tokens[: step.accepted])
        if accepted:
            out(Text(f"«{accepted}»" if plain else accepted, "" if plain else "green"))
        out(Text(text.push(step.tokens[step.accepted :]), "" if plain else "bold yellow"))
        if not plain:
            console.file.flush()
    out(Text(text.finish()))
    console.print()
    return seen


def show_tree(console: Console, tokenizer: Any, steps: list[Step]) -> None:
    """The tree of one step: the one where most was accepted, and among those the widest."""
    verified = [step for step in steps if step.tree is not None and len(step.tree) > 1]
    if not verified:
        return
    step = max(verified, key=lambda step: (step.accepted, len(step.tree) if step.tree else 0))
    assert step.tree is not None
    console.rule("one verified tree")
    console.print(Text(step.tree.draw(lambda token: tokenizer.decode([token]), accepted=step.path)))
    bonus = "" if step.bonus is None else f", and {tokenizer.decode([step.bonus])!r} is its own next one"
    line = f"One pass of the target checked {len(step.tree)} nodes: ✓ is what it would have written{bonus}.\n"
    console.print(line, markup=False)


def show_table(
    console: Console, rows: list[TimedLoop], speculation: Speculation, prompts: int, new_tokens: int
) -> None:
    console.rule(f"{prompts} held-out prompts, {new_tokens} new tokens each, float32, {threads()}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("", "tokens/s", "x HF", "x loop", "tokens/step", "identical"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    generate, loop = rows[0].rate, rows[1].rate
    for row in rows:
        per_step = speculation.tokens_per_step if row.run is speculation else 1.0
        table.add_row(
            row.name,
            f"{row.rate:.0f}",
            f"{row.rate / generate:.2f}",
            f"{row.rate / loop:.2f}",
            f"{per_step:.2f}",
            "-" if row is rows[0] else "yes" if row.ids == rows[0].ids else "no",
            style="bold" if row.run is speculation else None,
        )
    console.print(table)
    console.print("tokens/s: median, the prompt included; tokens/step: the bonus token included")
    identical = all(row.ids == rows[0].ids for row in rows)
    console.print(f"identical: {'yes' if identical else 'no'}", style="bold green" if identical else "bold red")


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
