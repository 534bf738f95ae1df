"""Weights that come from a disk: one token a step, chains and trees at equal residency, and what others do.

    python benchmarks/bench_offload.py --model DIR --questions question.jsonl --dir /dev/shm
    python benchmarks/bench_offload.py --random-gb 3 --resident-gb 1            # a made-up model, larger than memory
    python benchmarks/bench_offload.py --show FILE --markdown

Reading is held to stated rates by a token bucket behind the real reads, so that a step has a floor: the bytes that it
streams by the rate. `disk` is the folder's disk as it is; rates above what it gives need files in memory
(`--dir /dev/shm`), whose own rate is said, too. Questions are those of Spec-Bench (docs/benchmarks.md); what a draft
remembers is its own in every run. Others: accelerate's disk offload, and a model whose file is mapped, of which all but
the budget is given back to the system before each token. Weights that are made up accept nothing: of them only the time
of a step is said.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_real import read_questions
from common import RESULTS, Table, describe_run, progress, read_report, show, write_json

import treespec_compiler as treespec
from treespec_compiler.cli.models import load
from treespec_compiler.offload import ring
from treespec_compiler.offload.paging import page_out
from treespec_compiler.offload.rate import reading_rate
from treespec_compiler.speculation.drafts.recycle import Followers, RecycleDraft
from treespec_compiler.speculation.drafts.suffix import SuffixDraft

TASKS = ("chat", "summarization", "rag")
MERGED = ("ngram", "suffix", "recycle")
LOOPS = {
    "one token": ((), "1"),
    "chain of 6": (MERGED, "chain:6"),
    "tree of 32": (MERGED, "best-first:32"),
    "auto": (MERGED, "auto"),
}
"""What guesses, and the shape. All of them stream the same layers."""
HEAD = "head"
OF_HEAD = {"head, chain of 4": ((HEAD,), "chain:4"), "head, tree of 32": ((HEAD,), "best-first:32")}
DISK = "disk"


class Bucket:
    """Holds reads to a rate, all of them together."""

    def __init__(self, rate: float) -> None:
        self.rate, self._free, self._lock = rate, 0.0, threading.Lock()

    def behind(self, read: Callable[..., None]) -> Callable[..., None]:
        def limited(path: Path, length: int, *rest: Any) -> None:
            with self._lock:
                self._free = until = max(self._free, time.perf_counter()) + length / self.rate
            read(path, length, *rest)
            time.sleep(max(0.0, until - time.perf_counter()))

        return limited


@dataclass(frozen=True)
class Row:
    """One loop over all questions, at one rate. `rate` is in bytes a second, `disk` says that it was measured."""

    loop: str
    rate: float
    disk: bool
    tokens: int
    steps: int
    nodes: float
    seconds: float
    waited: float
    drafting: float
    floor: float
    """Seconds of a step that reading alone takes."""

    @property
    def step(self) -> float:
        return self.seconds / self.steps

    @property
    def name(self) -> str:
        return f"{self.rate / 1e9:.2g} GB/s" + (" (disk)" if self.disk else "")


def drafts_of(names: Sequence[str], vocab: int, head: Path | None) -> list[Any]:
    made: dict[str, Callable[[], Any]] = {"suffix": SuffixDraft, "recycle": lambda: RecycleDraft(Followers(vocab))}
    made[HEAD] = lambda: f"eagle3:{head}"
    return [made[name]() if name in made else name for name in names]


def run_loop(
    name: str, program: Any, prompts: Sequence[Any], rate: float, disk: bool, tokens: int, head: Path | None
) -> Row:
    """Every prompt by one loop. Times are those of steps: prompts are not in them."""
    names, policy = (LOOPS | OF_HEAD)[name]
    drafts, found, waited = drafts_of(names, program.vocab_size, head), [], 0.0
    for prompt in prompts:
        run = treespec.stream(
            program, prompt, draft=drafts or None, policy=policy, max_new_tokens=tokens, eos_token_id=()
        )
        next(run)  # the token that the prompt gives
        waited -= run.stats.weight_wait_seconds
        for _ in run:
            pass
        waited += run.stats.weight_wait_seconds
        found.append(run.stats)
    steps = sum(stats.steps for stats in found)
    return Row(
        name,
        rate,
        disk,
        sum(stats.step_tokens for stats in found),
        steps,
        sum(stats.nodes for stats in found) / steps,
        sum(stats.step_seconds for stats in found),
        waited,
        sum(stats.draft_seconds for stats in found),
        program.state.streaming.bytes / rate,
    )


def transformers_model(folder: Path) -> Any:
    """Its weights stay mapped, where the file's dtype is float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hugging_face(folder: Path, prompt: Any, tokens: int, resident: float, blobs: Path) -> dict[str, Any]:
    """accelerate's disk offload under the same budget, one token a step; its reads go through the page cache."""
    from accelerate import dispatch_model, infer_auto_device_map

    model = transformers_model(folder)
    whole = [type(model.model.layers[0]).__name__]
    places = infer_auto_device_map(model, {"cpu": int(resident)}, no_split_module_classes=whole)
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(blobs))
    ids = torch.as_tensor(prompt).view(1, -1)
    seconds = []
    for count in (1, 1 + tokens):
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - began)
    on_disk = sum(place == "disk" for place in places.values())
    return {"seconds_per_token": (seconds[1] - seconds[0]) / tokens, "tokens": tokens, "modules_on_disk": on_disk}


def mapped(folder: Path, prompt: Any, tokens: int, resident: float) -> dict[str, Any]:
    """transformers alone on mapped weights, a token a step: what a machine does whose memory holds the budget."""
    model = transformers_model(folder)
    held, given_back = 0.0, []
    for parameter in dict.fromkeys(model.parameters()):
        held += parameter.numel() * parameter.element_size()
        if held > resident:
            given_back.append(parameter)
    ids, past, seconds = torch.as_tensor(prompt).view(1, -1), None, []
    os.sync()  # pages that are not written yet would stay
    with torch.no_grad():
        for _ in range(1 + tokens):
            page_out(given_back)
            for file in folder.glob("*.safetensors"):
                handle = os.open(file, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)
            began = time.perf_counter()
            out = model(ids, past_key_values=past, use_cache=True)
            seconds.append(time.perf_counter() - began)
            ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    return {"seconds_per_token": sum(seconds[1:]) / tokens, "tokens": tokens, "bytes_given_back": int(held - resident)}


def made_up(folder: Path, gigabytes: float, width: int) -> None:
    """A Llama of so many 10^9 bytes of float32, written to a folder."""
    import transformers

    inner = 11 * width // 4
    layer = 4 * (4 * width**2 + 3 * width * inner)  # bytes
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=16,
        num_hidden_layers=max(4, round(gigabytes * 1e9 / layer)),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def rates_of(texts: Sequence[str], folder: Path) -> list[tuple[float, bool]]:
    """In bytes a second, and whether it is the disk's own, which is measured."""
    return [(reading_rate(folder), True) if text == DISK else (float(text) * 1e9, False) for text in texts]


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    rows = [Row(**row) for row in report["rows"]]
    streamed, settings = report["streamed"], report["settings"]
    headings = ["", "tokens/s", "tokens/step", "nodes/step", "s/step", "of the floor", "waiting", "speed"]
    found = []
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        plain = next(row for row in mine if row.loop == "one token")
        table = Table(f"{name}: {streamed['bytes'] / 1e6:,.0f} MB a step, floor {plain.floor:.3f} s", headings)
        for row in mine:
            speed = (row.tokens / row.seconds) / (plain.tokens / plain.seconds)
            table.rows.append(
                [
                    row.loop,
                    f"{row.tokens / row.seconds:.2f}",
                    f"{row.tokens / row.steps:.2f}",
                    f"{row.nodes:.1f}",
                    f"{row.step:.3f}",
                    f"{row.floor / row.step:.0%}",
                    f"{row.waited / row.seconds:.0%}",
                    f"{speed:.2f} x",
                ]
            )
        found.append(table)
    notes = [
        f"{streamed['layers']} layers streamed, {streamed['resident'] / 1e6:,.0f} MB resident; {settings['tokens']} "
        f"tokens for each of {settings['prompts']} prompts; of the floor: what reading alone takes, of a step."
    ]
    notes.append(f"The folder itself gives {report['folder_rate'] / 1e9:.2f} GB/s; no rate above that was reached.")
    peer, of_file = report["hugging_face"], report["mapped"]
    if of_file:
        notes.append(f"transformers on a mapped file, same budget: {of_file['seconds_per_token']:.3f} s a token.")
    if peer:
        notes.append(
            f"Hugging Face with accelerate's disk offload, same budget, files in the page cache: "
            f"{peer['seconds_per_token']:.3f} s a token."
        )
    return found, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--questions", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--random-gb", type=float, help="a made-up model of this size instead")
    parser.add_argument("--width", type=int, default=2048, help="of its layers")
    parser.add_argument("--resident-gb", type=float, help="default: what cannot be streamed, and the ring")
    parser.add_argument("--slots", type=int, default=4, help="of the ring (default: 4)")
    parser.add_argument("--head", type=Path, help="folder of an EAGLE-3 head for the model")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--rates", default="1,disk", help='GB/s, and "disk" (default: 1,disk)')
    parser.add_argument("--each", type=int, default=1, help="questions a task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=400, help="longest prompt, in tokens")
    parser.add_argument("--lowering", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--no-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--dir", type=Path, help="for files of weights (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a file that this script wrote")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.show:
        report = read_report(options.show, "rows", "settings", "run", benchmark="offload")
        return show(*tables(report), options.markdown)
    if (options.random_gb is None) == (options.model is None) or (options.model and not options.questions):
        parser.error("expected --model DIR with --questions FILE, or --random-gb")
    with tempfile.TemporaryDirectory(prefix="treespec-offload-", dir=options.dir) as folder:
        report = measured(options, Path(folder))
    write_json(options.output or RESULTS / "offload.json", report)
    show(*tables(report), options.markdown)


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.random_gb is not None:
        made_up(folder / "model", options.random_gb, options.width)
        gc.collect()
        where, prompts, loops = folder / "model", [list(range(1, 33))], ["one token"]
        model = transformers_model(where)
    else:
        found = load(f"hf:{options.model}")
        where, model, loops = options.model, found.model, list(LOOPS)
        tasks = options.tasks.split(",")
        asked = read_questions(options.questions, found.tokenizer, options.each, options.prompt)
        prompts = [question.ids for question in asked if question.task in tasks]
    if not prompts:
        sys.exit(f"got no question of {options.tasks} with {options.prompt} tokens or fewer")
    if options.head is not None:
        loops += OF_HEAD
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    resident = options.resident_gb or least(model, options.slots)
    offload = {"dir": str(folder / "blobs"), "resident_gb": resident, "slots": options.slots}
    program = treespec.tree_program(model, options={"lowering": options.lowering, "offload": offload})
    streaming = program.state.streaming
    if streaming is None:
        sys.exit("got a model that fits, expected a smaller --resident-gb")
    program.check()
    rates, rows = rates_of(options.rates.split(","), folder), []
    read = ring.read_file
    with progress(len(rates) * len(loops) + 1) as say:
        for rate, disk in rates:
            ring.read_file = read if disk else Bucket(rate).behind(read)
            for name in loops:
                say(f"{rate / 1e9:.2f} GB/s, {name}")
                rows.append(run_loop(name, program, prompts, rate, disk, options.tokens, options.head))
        ring.read_file = read
        say("Hugging Face")
        peer = of_file = None
        if not options.no_peer:
            peer = hugging_face(where, prompts[0], 4, resident * 1e9, folder / "peer")
            of_file = mapped(where, prompts[0], 4, resident * 1e9)
    settings = {
        "model": options.model.name if options.model else f"random, {options.random_gb} GB",
        "tokens": options.tokens,
        "prompts": len(prompts),
        "lowering": options.lowering,
        "slots": options.slots,
        "loops": {name: dict(zip(("draft", "policy"), (LOOPS | OF_HEAD)[name], strict=True)) for name in loops},
    }
    held = {"bytes": streaming.bytes, "layers": len(streaming.layers), "resident": streaming.resident}
    about = describe_run(torch.get_num_threads())
    return {
        "benchmark": "offload",
        "run": about,
        "settings": settings,
        "streamed": held,
        "folder_rate": reading_rate(folder),
        "hugging_face": peer,
        "mapped": of_file,
        "rows": [asdict(row) for row in rows],
    }


def least(model: Any, slots: int = 2) -> float:
    """10^9 bytes: what a refusal says that is needed."""
    from treespec_compiler.capture.call import call_spec
    from treespec_compiler.passes.streaming.plan import layers
    from treespec_compiler.pipeline import convert

    options = treespec.Options.parse({"lowering": "eager"})
    state = convert(model, call_spec(model), options).state
    sizes = [layer.bytes for layer in layers(state)]
    weights = [state.weights[node.name] for node in state.graph.nodes if node.name in state.weights and node.users]
    whole = sum(torch.Size(made.shape).numel() * made.dtype.itemsize for made in weights)
    return (whole - sum(sizes) + slots * max(sizes)) / 1e9


if __name__ == "__main__":
    main()
