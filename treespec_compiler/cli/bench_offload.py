"""`treespec bench offload`: what a step takes whose weights are streamed, and a picture of some steps."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from ..errors import InvalidOption
from ..offload.rate import reading_rate
from ..offload.timeline import Span, noted, timeline_svg
from ..program.tree_program import tree_program
from ..runtime.generate import stream
from ..runtime.stats import Stats
from ..speculation.drafts.kinds import is_named
from ..versions import versions
from .arguments import mapped_under, parse_options, with_offload
from .models import DTYPES, load
from .text import read_prompt

SHOWN = 2
"""Steps of the picture: where one ends, the first layers of the next are read already."""


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("streamed weights (bench offload)")
    group.add_argument("--timeline", metavar="F", type=Path, help="draw the last steps into an SVG file")
    group.add_argument("--prompt", metavar="TEXT", help="default: 32 tokens without a meaning")
    group.add_argument("--prompt-ids", metavar="IDS", help="as for `treespec generate`")
    group.set_defaults(prompt_file=None)


def run(arguments: Namespace) -> int:
    if arguments.model is None or arguments.url is not None:
        raise InvalidOption(name="MODEL", got="none", expected="a model whose weights are streamed")
    options = with_offload(parse_options(arguments.option), arguments)
    if options.offload is None:
        raise InvalidOption(name="--offload", got=None, expected="disk", fix="Add --offload disk --resident-gb GB.")
    screen = Console(stderr=True)
    with screen.status("reading models"):
        dtype = DTYPES[arguments.dtype or "float32"]
        target = load(arguments.model, dtype=dtype, mapped=mapped_under(arguments))
        drafts = [name if is_named(name) else load(name, role="draft", dtype=dtype).model for name in arguments.draft]
        said = arguments.prompt or arguments.prompt_ids
        prompt = read_prompt(arguments, target) if said else torch.arange(1, 33)[None]
    with screen.status("converting, writing files"):
        program = tree_program(target.model, options=options)
        program.check()
    streaming = program.state.streaming
    if streaming is None:
        fix = "Nothing would be streamed: name a smaller --resident-gb."
        raise InvalidOption(name="--resident-gb", got=arguments.resident_gb, expected="less than all weights", fix=fix)
    steps = stream(
        program,
        prompt,
        draft=drafts or None,
        policy=arguments.policy,
        max_new_tokens=arguments.max_tokens,
        eos_token_id=(),
    )
    with screen.status("decoding"), noted() as spans:
        marks = followed(steps, spans)
    rate = reading_rate(options.offload.path)
    report = summary(steps.stats, streaming.bytes, rate)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions("torch", "transformers")}
    if arguments.output is not None:
        text = json.dumps({"benchmark": "offload step", "model": arguments.model, **about, **report}, indent=1)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.timeline is not None:
        first = marks[-min(SHOWN, len(marks) - 1) - 1]
        arguments.timeline.write_text(timeline_svg(spans, first, marks[-1]) + "\n", encoding="utf-8")
    out = Console(highlight=False)
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        out.print(f"{name.replace('_', ' ')}: {shown}")
    return 0


def followed(steps: Any, spans: list[Span]) -> list[float]:
    """When each step ended; what drafts and the target did goes to `spans`."""
    marks, before = [perf_counter()], (0.0, 0.0)
    for _ in steps:
        stats: Stats = steps.stats
        now = (stats.draft_seconds, stats.verify_seconds)
        drafted = marks[-1] + now[0] - before[0]
        spans.append(Span("draft", marks[-1], drafted))
        spans.append(Span("verify", drafted, drafted + now[1] - before[1]))
        marks.append(perf_counter())
        before = now
    return marks


def summary(stats: Stats, streamed: int, rate: float) -> dict[str, Any]:
    """Of steps alone; the prompt is in none of the figures but what was waited for."""
    steps = max(1, stats.steps)
    return {
        "bytes_read_in_a_step": streamed,
        "disk_gb_per_second": rate / 1e9,
        "seconds_of_a_step_by_the_disk": streamed / rate,
        "seconds_of_a_step": stats.step_seconds / steps,
        "of_it_verifying": stats.verify_seconds / steps,
        "of_it_drafting": stats.draft_seconds / steps,
        "seconds_waited_for_weights": stats.weight_wait_seconds,
        "tokens_per_step": stats.tokens_per_step,
        "nodes_per_step": stats.nodes_per_step,
    }
