"""From the start of a process to the first tokens: treespec with cold and with warm caches, beside its peers.

    python benchmarks/bench_start.py --model DIR                  # table, and benchmarks/results/cpu/start.json
    python benchmarks/bench_start.py --model DIR --gguf FILE      # llama.cpp as well, where llama_cpp is installed
    python benchmarks/bench_start.py --show FILE --markdown

Every run is a process of its own, and seconds count from before it is started: Python, imports and loading are a user's
seconds too. Cold means that treespec's, Inductor's and the compiler's caches are empty folders; the warm runs after it
find what it left there. CPU seconds, of the process and of the compilers that it starts, stand beside the clock's,
since on a busy machine only they can be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "treespec_compiler" / "demo" / "target"
COLD, WARM, GENERATE, LLAMA = "treespec cold", "treespec warm", "Hugging Face generate", "llama.cpp"
SAVED, COMPILE, COMPILED = "treespec, saved program", "treespec compile", "treespec, compiled folder"
PROMPT = "Write a Python function that reverses a list, then explain it."
AIMS = {COLD: 30.0, WARM: 16.0, SAVED: 6.0, COMPILED: 2.5}
"""Seconds of SmolLM2-135M to its 30th token, on two quiet cores."""
ENDED = "measured: "


class Marks:
    """Clock and CPU seconds of one piece after the other."""

    def __init__(self, began: float) -> None:
        self.pieces: list[dict[str, Any]] = []
        self._last, self._cpu = began, (0.0, 0.0)

    def __call__(self, name: str) -> None:
        now, cpu = time.time(), _cpu()
        own, children = (b - a for a, b in zip(self._cpu, cpu, strict=True))
        self.pieces.append({"name": name, "seconds": now - self._last, "cpu": own, "children_cpu": children})
        self._last, self._cpu = now, cpu


def _cpu() -> tuple[float, float]:
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in found)
    return own, children


def run_treespec(model: Path, _: Path | None, tokens: int, mark: Marks) -> list[int]:
    """Convert, compare with the model, which lowers, and generate."""
    target, ids = _loaded(model, mark)
    import treespec_compiler as treespec

    program = treespec.tree_program(target)
    mark("capture, passes, packing")
    program.check()
    mark("lowering, comparison with the model")
    said: list[int] = []
    for step in treespec.stream(target, ids, max_new_tokens=tokens):
        if not said:
            mark("first token")
        said += [int(token) for token in step.tokens]
    mark("other tokens")
    return said


def run_converted(model: Path, gguf: Path | None, tokens: int, mark: Marks) -> list[int]:
    """As `run_treespec`, without saved programs: what Inductor and the C++ compiler keep is all that is there."""
    os.environ["TREESPEC_PROGRAM_CACHE"] = "0"
    return run_treespec(model, gguf, tokens, mark)


def run_saved(model: Path, gguf: Path | None, tokens: int, mark: Marks) -> list[int]:
    """As `run_treespec`, which takes the program that the first run saved."""
    os.environ["TREESPEC_PROGRAM_CACHE"] = "1"
    return run_treespec(model, gguf, tokens, mark)


def run_compile(model: Path, _: Path | None, tokens: int, mark: Marks) -> list[int]:
    """`treespec compile`, which says nothing; the prompt's ids are kept beside the folder."""
    import contextlib
    import io

    from treespec_compiler.cli.main import main as treespec

    mark("imports")
    with contextlib.redirect_stdout(io.StringIO()):
        if treespec(["compile", f"hf:{model}", "-o", str(_folder())]):
            sys.exit("treespec compile failed")
    mark("compile")
    return []


def run_compiled(model: Path, _: Path | None, tokens: int, mark: Marks) -> list[int]:
    """What `treespec generate FOLDER` does; nothing of transformers is imported."""
    import torch

    mark("import of torch")
    import treespec_compiler as treespec
    from treespec_compiler.runtime.folder_tokenizer import load_tokenizer

    _ = treespec.stream
    mark("import of treespec")
    program = treespec.load_program(_folder())
    tokenizer = load_tokenizer(program)
    ids = tokenizer.encode(PROMPT) if tokenizer is not None else [1]
    if tokenizer is not None and tokenizer.chat_template:
        asked = [{"role": "user", "content": PROMPT}]
        ids = list(map(int, tokenizer.apply_chat_template(asked, add_generation_prompt=True)))
    mark("load")
    program.check()
    mark("lowering or kept code, comparison with kept rows")
    said: list[int] = []
    for step in treespec.stream(program, torch.tensor([ids]), max_new_tokens=tokens):
        if not said:
            mark("first token")
        said += [int(token) for token in step.tokens]
    mark("other tokens")
    return said


def _folder() -> Path:
    """Where a run finds what the one before it compiled: with its caches."""
    return Path(os.environ["TREESPEC_CACHE_DIR"]).parent / "compiled"


def run_generate(model: Path, _: Path | None, tokens: int, mark: Marks) -> list[int]:
    target, ids = _loaded(model, mark)
    import torch

    with torch.no_grad():
        found = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    mark("all tokens")
    return [int(token) for token in found[0, ids.shape[1] :]]


def run_llama(model: Path, gguf: Path | None, tokens: int, mark: Marks) -> list[int]:
    from llama_cpp import Llama

    mark("imports")
    target = Llama(str(gguf), n_ctx=512, n_threads=os.cpu_count(), verbose=False)
    mark("load")
    ids, said = target.tokenize(PROMPT.encode()), []
    for token in target.generate(ids, temp=0.0):
        if not said:
            mark("first token")
        said.append(int(token))
        if len(said) == tokens:
            break
    mark("other tokens")
    return said


def _loaded(model: Path, mark: Marks) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mark("imports")
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(PROMPT, return_tensors="pt")
    mark("load")
    return target, ids["input_ids"]


RUNS: dict[str, Callable[[Path, Path | None, int, Marks], list[int]]] = {
    COLD: run_treespec,
    WARM: run_converted,
    SAVED: run_saved,
    COMPILE: run_compile,
    COMPILED: run_compiled,
    GENERATE: run_generate,
    LLAMA: run_llama,
}


def work(options: argparse.Namespace) -> None:
    """What a process of one run does."""
    mark = Marks(options.began)
    said = RUNS[options.work](options.model, options.gguf, options.tokens, mark)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(ENDED + json.dumps({"pieces": mark.pieces, "tokens": said, "peak_bytes": peak}))


def measure(name: str, options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """One run in a process of its own, whose caches lie in a folder."""
    folders = {"TREESPEC_CACHE_DIR": "treespec", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have their byte code, and so has a second run
    for variable, folder in folders.items():
        (caches / folder).mkdir(exist_ok=True)
        environment[variable] = str(caches / folder)
    command = [sys.executable, __file__, "--work", name, "--model", str(options.model), "--tokens", str(options.tokens)]
    command += ["--gguf", str(options.gguf)] if options.gguf is not None else []
    done = subprocess.run([*command, "--began", repr(time.time())], env=environment, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(ENDED)), None)
    if done.returncode or line is None:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix(ENDED))
    return {"name": name, **found}


def left_out(gguf: Path | None) -> str | None:
    """Why there is no llama.cpp."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama_cpp is not installed"
    return "no --gguf was given" if gguf is None else None


def total(run: dict[str, Any], *what: str) -> float:
    return sum(piece[each] for piece in run["pieces"] for each in what)


def of_name(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [run for run in report["runs"] if run["name"] == name]


def tables(report: dict[str, Any]) -> tuple[list[Any], list[str]]:
    from common import Table

    count = report["settings"]["tokens"]
    names = [name for name in RUNS if of_name(report, name)]
    whole = Table(
        f"From the start of a process to token {count}, medians", ("", "runs", "s", "CPU s", "of compilers", "peak MB")
    )
    for name in names:
        runs = of_name(report, name)
        cells = [statistics.median(total(run, *what) for run in runs) for what in WHAT]
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
        whole.add(name, str(len(runs)), *(f"{cell:.1f}" for cell in cells), f"{peak:.0f}", bold=name in AIMS)
    found = [whole]
    for name in (name for name in names if name in AIMS):
        pieces = Table(f"{name}, piece by piece", ("", "s", "CPU s", "of compilers"))
        runs = of_name(report, name)
        for i, piece in enumerate(runs[0]["pieces"]):
            one = [{"pieces": [run["pieces"][i]]} for run in runs]
            pieces.add(piece["name"], *(f"{statistics.median(total(r, *what) for r in one):.1f}" for what in WHAT))
        found.append(pieces)
    notes = [f"{LLAMA} is left out: {report['left_out']}."] if report["left_out"] else []
    same = {tuple(run["tokens"]) for run in report["runs"] if run["name"] not in (LLAMA, COMPILE)}
    notes.append("treespec and Hugging Face said the same." if len(same) == 1 else "treespec said something else.")
    load = report["run"]["load_average"]
    notes.append(f"Load average when it began: {load:.1f} on {report['run']['cores']} cores.")
    return found, notes


WHAT: tuple[tuple[str, ...], ...] = (("seconds",), ("cpu", "children_cpu"), ("children_cpu",))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of a Hugging Face model (default: the demo's)")
    parser.add_argument("--gguf", type=Path, help="the same model as a GGUF file, for llama.cpp")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="of warm runs and peers; cold is run once a --cold")
    parser.add_argument("--cold", type=int, default=1, help="cold runs, each with caches of its own")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME", help="of the runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a file that this script wrote")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--work", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options)  # NOTE before anything is imported that a run is to import itself

    import torch
    from common import RESULTS, describe_run, progress, read_report, show, write_json

    if options.show:
        report = read_report(options.show, "runs", "settings", "run", benchmark="start")
        return show(*tables(report), options.markdown)
    if options.rounds < 1 or options.cold < 1 or options.tokens < 1:
        parser.error("got a number below 1, expected at least one of --tokens, --rounds and --cold")
    why = left_out(options.gguf)
    peers = [GENERATE, *([LLAMA] if why is None else [])]
    about, runs = describe_run(torch.get_num_threads()), list[dict[str, Any]]()
    with progress(options.cold + options.rounds * (3 + len(peers)) + 3) as say:
        for i in range(options.cold):
            with tempfile.TemporaryDirectory(prefix="treespec-start-") as caches:
                names = [COLD, *([WARM, *peers] * options.rounds if i == options.cold - 1 else [])]
                if i == options.cold - 1:  # a first run of each saves what the others find
                    names += [SAVED, COMPILE, COMPILED, *([SAVED, COMPILED] * options.rounds)]
                firsts = {SAVED, COMPILED}
                for name in (name for name in names if name in options.only):
                    say(name)
                    found = measure(name, options, Path(caches))
                    runs += [] if name in firsts else [found]
                    firsts -= {name}
        say("done")
    settings = {"model": str(options.model.name), "tokens": options.tokens, "prompt": PROMPT, "aims": AIMS}
    report = {"benchmark": "start", "run": about, "settings": settings, "left_out": why, "runs": runs}
    write_json(options.output or RESULTS / "start.json", report)
    show(*tables(report), options.markdown)


if __name__ == "__main__":
    main()
