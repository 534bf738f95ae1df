"""Many requests at once: the engine without a draft, with chains, with trees, and as `auto` chooses them by load.

    python benchmarks/bench_batch.py                                   # demo pair; results/cpu/batch.json, batch.svg
    python benchmarks/bench_batch.py --target smollm2 --draft ngram suffix --questions question.jsonl \
        --output benchmarks/results/cpu/batch-smollm2.json
    python benchmarks/bench_batch.py --show benchmarks/results/cpu/batch.json --markdown

For each number of requests every loop runs the same prompts, in turn, several times: all requests begin at once, and
each gives the same number of tokens. So the last ones run alone where a draft is better for some than for others; with
`--waves 3` there are three prompts for each place, as under a load that goes on. Tokens a second are those of all
requests together, prompts included. Hugging Face's `generate` gets them as one batch padded on the left,
`generate_batch` is its continuous batching; one that fails on this machine is left out, and the report says why. The
best chain and the best tree are those of the fastest medians.

Whether `auto` costs anything where speculation does not pay is a question of single percents, on machines that are
noisier: rounds are compared in pairs, by the clock and by CPU seconds, with the interval of the median ratio;
`--control` runs the engine without a draft twice, whose ratio is 1, and shows what can be told apart.

    python benchmarks/bench_batch.py --target smollm2 --draft ngram suffix --questions question.jsonl --alone \
        --control --chains --trees --rounds 12 --requests 1 4 16 --output benchmarks/results/cpu/batch-overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from batch_pictures import picture
from common import RESULTS, Quartiles, Table, describe_run, orders, progress, read_report, settle, show, write_json

import treespec_compiler as treespec
from treespec_compiler import demo
from treespec_compiler.cli.models import load

PLAIN, AUTO, CONTROL = "without a draft", "auto", "without a draft, again"
GENERATE, CONTINUOUS = "Hugging Face generate, padded", "Hugging Face generate_batch"
CHAINS = ("chain:2", "chain:4")
TREES = ("2,1,1", "best-first:8", "best-first:16")


@dataclass
class Loop:
    """A way to run a batch: (prompts, new tokens) -> new tokens of each, and what is known of it beside."""

    name: str
    run: Callable[[list[list[int]], int], tuple[list[list[int]], dict[str, float]]]
    close: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    about: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    def measure(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        began, cpu = perf_counter(), process_time()
        found, self.about = self.run(prompts, new)
        self.seconds.append(perf_counter() - began)
        self.cpu.append(process_time() - cpu)
        self.tokens.append(sum(map(len, found)))
        return found

    @property
    def speed(self) -> Quartiles:
        return Quartiles.of([count / seconds for count, seconds in zip(self.tokens, self.seconds, strict=True)])

    def describe(self) -> dict[str, Any]:
        known = {"seconds": self.seconds, "cpu": self.cpu, "tokens": self.tokens, "about": self.about}
        return {"name": self.name, **({"problem": self.problem} if self.problem else known)}


def engine_loop(name: str, model: Any, size: int, room: int, **settings: Any) -> Loop:
    engine = treespec.Engine(model, max_requests=size, max_tokens=size * room, **settings)

    def run(prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, float]]:
        engine.forget()  # what the last round computed would be found
        before = engine.stats
        requests = [engine.add(ids, max_new_tokens=new, eos_token_id=()) for ids in prompts]
        engine.run()
        after = engine.stats
        steps = after.steps - before.steps
        about = {
            "steps": steps,
            "nodes_per_step": (after.nodes - before.nodes) / steps,
            "accepted": after.accepted - before.accepted,
            "preemptions": after.preemptions - before.preemptions,
        }
        return [request.result().tokens for request in requests], about

    return Loop(name, run, engine.close)


def generate_loop(model: Any, size: int) -> Loop:
    """Batches of `size` prompts, one after the other."""

    def run(prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, float]]:
        found = [tokens for at in range(0, len(prompts), size) for tokens in batch(prompts[at : at + size], new)]
        return found, {}

    def batch(prompts: list[list[int]], new: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, **settings)
        found: list[list[int]] = out[:, longest:].tolist()
        return found

    return Loop(GENERATE, run)


def continuous_loop(model: Any) -> Loop:
    from transformers import GenerationConfig

    def run(prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, float]]:
        chosen = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(prompts, generation_config=chosen)
        if len(found) != len(prompts):
            raise RuntimeError(f"{len(found)} answers to {len(prompts)} prompts")
        return [list(one.generated_tokens) for one in found.values()], {}

    return Loop(CONTINUOUS, run)


def loops_for(given: argparse.Namespace, model: Any, draft: Any, size: int, room: int) -> list[Loop]:
    found = [engine_loop(name, model, size, room) for name in (PLAIN, *([CONTROL] if given.control else []))]
    for policy in (*given.chains, *given.trees, AUTO):
        found.append(engine_loop(policy, model, size, room, draft=draft, policy=policy))
    return found + ([] if given.alone else [generate_loop(model, size), continuous_loop(copy.deepcopy(model))])


def compare(loops: list[Loop], prompts: list[list[int]], given: argparse.Namespace) -> dict[str, bool]:
    """Every loop `given.rounds` times; whether each gave what the engine without a draft gave."""
    expected = loops[0].measure(prompts, given.new_tokens)
    same = {}
    for loop in loops:
        try:
            for _ in range(given.warm_up):
                same[loop.name] = loop.measure(prompts, given.new_tokens) == expected
        except Exception as error:
            loop.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
        loop.seconds.clear(), loop.cpu.clear(), loop.tokens.clear()
    running = [loop for loop in loops if not loop.problem]
    sequence = orders(len(running))
    for turn in range(given.rounds):
        for index in sequence[turn % len(sequence)]:
            running[index].measure(prompts, given.new_tokens)
    for loop in loops:
        loop.close()
    return same


def prompts_of(given: argparse.Namespace, tokenizer: Any, count: int) -> list[list[int]]:
    """`count` different prompts: of a file of questions with the model's chat template, or the demo's."""
    if given.questions is None:
        texts = [prompt.text for prompt in demo.heldout_prompts()]
        found = [list(tokenizer.encode(text))[: given.prompt_tokens] for text in texts]
    else:
        lines = [json.loads(line) for line in given.questions.read_text("utf-8").splitlines() if line.strip()]
        messages = [[{"role": "user", "content": line["turns"][0]}] for line in lines]
        shown = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
        found = [list(tokenizer.encode(text, add_special_tokens=False)) for text in shown]
        found = [ids for ids in found if len(ids) <= given.prompt_tokens]
    found = found[:: max(1, len(found) // count)][:count]
    if len(found) < count:
        sys.exit(f"got {len(found)} prompts of at most {given.prompt_tokens} tokens, expected {count}")
    return found


def summary(batches: Sequence[dict[str, Any]], chains: Sequence[str], trees: Sequence[str]) -> dict[str, list[Any]]:
    """Median tokens a second by the number of requests: plain, the best chain and tree, auto, and Hugging Face."""
    lines: dict[str, list[Any]] = {}
    for batch in batches:
        speeds = {
            loop["name"]: Quartiles.of([t / s for t, s in zip(loop["tokens"], loop["seconds"], strict=True)]).median
            for loop in batch["loops"]
            if "problem" not in loop
        }
        lines.setdefault(PLAIN, []).append(speeds.get(PLAIN))
        for name, kinds in (("best chain", chains), ("best tree", trees)):
            lines.setdefault(name, []).append(max((speeds[k] for k in kinds if k in speeds), default=None))
        for name in (AUTO, GENERATE, CONTINUOUS):
            lines.setdefault(name, []).append(speeds.get(name))
    return {name: values for name, values in lines.items() if any(value is not None for value in values)}


def paired(batch: dict[str, Any], name: str, what: str) -> tuple[float, float, float] | None:
    """Median of the ratios, round by round, of the engine without a draft to a loop, with its 95 % bootstrap interval:
    above 1 where the loop takes less. None: it was not run, or by an earlier version."""
    found = {loop["name"]: loop.get(what) for loop in batch["loops"]}
    if not found.get(name) or not found.get(PLAIN):
        return None
    ratios = [plain / own for plain, own in zip(found[PLAIN], found[name], strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-51]


def pairs(report: dict[str, Any]) -> Table | None:
    table = Table("Over the engine without a draft, round by round: median (95 %)", ["", "by", *report["requests"]])
    for name in (AUTO, CONTROL):
        for what, by in (("seconds", "the clock"), ("cpu", "CPU seconds")):
            found = [paired(batch, name, what) for batch in report["batches"]]
            if any(found):
                table.add(name, by, *("" if f is None else f"{f[0]:.3f} ({f[1]:.3f}-{f[2]:.3f})" for f in found))
    return table if table.rows else None


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    sizes = [batch["requests"] for batch in report["batches"]]
    table = Table("Tokens a second of all requests together", ["", *(f"{size}" for size in sizes)])
    each = Table("Tokens a second of each request", ["", *(f"{size}" for size in sizes)])
    for name, values in report["summary"].items():
        table.add(name, *("" if v is None else f"{v:.0f}" for v in values), bold=name == AUTO)
        each.add(name, *("" if v is None else f"{v / n:.1f}" for v, n in zip(values, sizes)), bold=name == AUTO)
    plain, auto = report["summary"][PLAIN], report["summary"][AUTO]
    notes = [f"auto over plain: {', '.join(f'{a / p:.2f} ({n})' for a, p, n in zip(auto, plain, sizes))}."]
    problems = {loop["name"]: loop["problem"] for b in report["batches"] for loop in b["loops"] if "problem" in loop}
    notes += [f"{name} is left out: {problem}." for name, problem in problems.items()]
    other = sorted({name for batch in report["batches"] for name, same in batch["same"].items() if not same})
    notes.append(f"Other tokens than the engine without a draft: {', '.join(other) or 'nobody'}.")
    compared = pairs({"requests": [f"{size}" for size in sizes], "batches": report["batches"]})
    return [table, each, *([compared] if compared is not None else [])], notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="demo", help="hf:FOLDER, smollm2, or demo (default)")
    parser.add_argument("--draft", nargs="+", default=["demo"], help="a model, or names of drafts without one")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="longest prompt")
    parser.add_argument("--questions", type=Path, help="Spec-Bench's question.jsonl, asked with the chat template")
    parser.add_argument("--chains", nargs="*", default=list(CHAINS))
    parser.add_argument("--trees", nargs="*", default=list(TREES))
    parser.add_argument("--waves", type=int, default=1, help="prompts for each place: who ends makes room for the next")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without Hugging Face's loops")
    parser.add_argument("--control", action="store_true", help="the engine without a draft a second time")
    parser.add_argument("--output", type=Path, default=RESULTS / "batch.json")
    parser.add_argument("--show", type=Path, help="print the tables of a report")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.show is not None:
        show(*tables(read_report(given.show, "batches", "summary", benchmark="batch")), given.markdown)
        return
    loaded = load(given.target)
    draft: Any = [load(n, role="draft").model if n == "demo" or n.startswith("hf:") else n for n in given.draft]
    draft = draft[0] if len(draft) == 1 else draft
    prompts = prompts_of(given, loaded.tokenizer, max(given.requests) * given.waves)
    room = max(map(len, prompts)) + given.new_tokens
    batches: list[dict[str, Any]] = []
    with progress(len(given.requests)) as say:
        for size in given.requests:
            say(f"{size} requests")
            loops = loops_for(given, loaded.model, draft, size, room)
            settle()
            same = compare(loops, prompts[: size * given.waves], given)
            batches.append({"requests": size, "same": same, "loops": [loop.describe() for loop in loops]})
    report = {
        "benchmark": "batch",
        "run": describe_run(torch.get_num_threads()),
        "settings": {k: str(v) for k, v in vars(given).items() if k not in ("output", "show", "markdown")},
        "prompt_tokens": [len(ids) for ids in prompts],
        "batches": batches,
        "summary": summary(batches, given.chains, given.trees),
    }
    write_json(given.output, report)
    title = f"{given.target}, draft {' + '.join(given.draft)}: {given.new_tokens} tokens a request"
    given.output.with_suffix(".svg").write_text(picture(title, given.requests, report["summary"]), encoding="utf-8")
    show(*tables(report), given.markdown)


if __name__ == "__main__":
    main()
