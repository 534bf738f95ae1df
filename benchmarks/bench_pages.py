"""How many tokens should a page of K/V hold? The engine without a draft, with several sizes of pages.

    python benchmarks/bench_pages.py                       # demo; results/cpu/pages.json
    python benchmarks/bench_pages.py --show benchmarks/results/cpu/pages.json --markdown

Every engine runs the same requests, which begin with the same words, in turn, several times: tokens a second of
processor time, all requests together, and the pages and tokens' places that were held before the last step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import RESULTS, Quartiles, Table, describe_run, orders, progress, read_report, settle, show, write_json

import treespec_compiler as treespec
from treespec_compiler import demo

SIZES = (16, 32, 64, 128)


class Loop:
    """An engine with pages of `size` tokens."""

    def __init__(self, model: Any, size: int, requests: int, room: int) -> None:
        self.size = size
        self.engine = treespec.Engine(model, max_requests=requests, max_tokens=requests * room, page_size=size)
        self.seconds: list[float] = []
        self.tokens: list[list[int]] = []
        self.held = 0

    def measure(self, prompts: list[list[int]], new: int) -> None:
        self.engine.forget()
        began = process_time()
        requests = [self.engine.add(ids, max_new_tokens=new, eos_token_id=()) for ids in prompts]
        while self.engine.step():
            stats = self.engine.stats
            if stats.running == len(prompts):
                self.held = stats.pages.held
        self.engine.run()
        self.seconds.append(process_time() - began)
        self.tokens = [request.result().tokens for request in requests]

    def describe(self) -> dict[str, Any]:
        return {"page_size": self.size, "seconds": self.seconds, "pages": self.held, "places": self.held * self.size}


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    table = Table("Pages", ["tokens a page", "tokens/s", "pages held", "places held"])
    for loop in report["loops"]:
        speed = Quartiles.of([report["tokens"] / seconds for seconds in loop["seconds"]])
        table.add(f"{loop['page_size']}", f"{speed:.0f}", f"{loop['pages']}", f"{loop['places']}")
    return [table], [f"The same tokens with every size: {'yes' if report['same'] else 'no'}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--shared", type=int, default=100, help="tokens that all prompts begin with")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "pages.json")
    parser.add_argument("--show", type=Path, help="print the table of a report")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.show is not None:
        show(*tables(read_report(given.show, "loops", "tokens", benchmark="pages")), given.markdown)
        return
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    texts = [list(tokenizer.encode(prompt.text)) for prompt in demo.heldout_prompts()]
    beginning = texts[0][: given.shared]
    prompts = [(beginning + text)[: given.prompt_tokens] for text in texts[1 : given.requests + 1]]
    loops = [Loop(model, size, given.requests, given.prompt_tokens + given.new_tokens) for size in given.sizes]
    settle()
    for loop in loops:
        loop.measure(prompts, given.new_tokens)
        loop.seconds.clear()
    sequence = orders(len(loops))
    with progress(given.rounds) as say:
        for turn in range(given.rounds):
            say(f"round {turn + 1}")
            for index in sequence[turn % len(sequence)]:
                loops[index].measure(prompts, given.new_tokens)
    report = {
        "benchmark": "pages",
        "run": describe_run(torch.get_num_threads()),
        "settings": {k: str(v) for k, v in vars(given).items() if k not in ("output", "show", "markdown")},
        "tokens": len(prompts) * given.new_tokens,
        "same": all(loop.tokens == loops[0].tokens for loop in loops),
        "loops": [loop.describe() for loop in loops],
    }
    write_json(given.output, report)
    show(*tables(report), given.markdown)


if __name__ == "__main__":
    main()
