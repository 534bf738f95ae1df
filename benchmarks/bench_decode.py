"""Decoding speed on held-out prompts: Hugging Face, the best plain loop, and treespec, interleaved in one process.

    python benchmarks/bench_decode.py                          # the demo pair; benchmarks/results/cpu/decode.json
    python benchmarks/bench_decode.py --target hf:PATH --draft hf:PATH --prompts-file heldout.json
    python benchmarks/bench_decode.py --show benchmarks/results/cpu/decode.json --markdown

Which policy stands for treespec is chosen on prompts that are not measured, or named with --policy.
docs/benchmarks.md says how it is measured and why.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    RESULTS,
    describe_run,
    interleave,
    orders,
    progress,
    read_report,
    settle,
    show,
    write_json,
)
from decode_report import summarize, tables
from loops import (
    STATIC,
    Loop,
    Run,
    assisted_loops,
    generate_loop,
    plain_treespec_loop,
    static_loop,
    treespec_loop,
)
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler import demo
from treespec_compiler.cli.models import load
from treespec_compiler.speculation.sampling.ranking import likeliest

# Trees of 6 to 9 nodes: about what one pass over the weights serves on a CPU. `auto` is the default of `generate`.
POLICIES = ("auto", "auto+ngram", "1,1,1,1,1,1,1", "2,1,1", "1,2,1,1", "1,1,3")
CANDIDATES = (
    *POLICIES,
    "chain:2",
    "chain:3",
    "chain:4",
    "chain:5",
    "chain:6",
    "2,1,1,1",
    "1,1,2,1",
    "2,2,1",
    "chain:4+ngram",
)


@dataclass(frozen=True)
class Prompt:
    module: str
    line: int
    ids: Tensor  # [1, S]

    def describe(self) -> dict[str, Any]:
        return {"module": self.module, "line": self.line, "tokens": self.ids.shape[1]}


def read_prompts(path: Path, tokenizer: Any) -> list[Prompt]:
    items = json.loads(path.read_text(encoding="utf-8"))
    return [Prompt(i["module"], i["line"], torch.tensor([tokenizer.encode(i["text"])])) for i in items]


def split_prompts(prompts: Sequence[Prompt], measured: int, calibration: int) -> tuple[list[Prompt], list[Prompt]]:
    """Measured and calibration prompts, both spread over the file; no prompt is in both."""
    if len(prompts) <= calibration:
        sys.exit(f"got {len(prompts)} prompts, expected more than the {calibration} that the expansion is chosen on")
    kept = {round(i * len(prompts) / calibration) for i in range(calibration)}
    rest = [p for i, p in enumerate(prompts) if i not in kept]
    return rest[:measured], [p for i, p in enumerate(prompts) if i in kept]


def run_all(
    loops: Sequence[Loop], prompts: Sequence[Prompt], new_tokens: int, say: Callable[[str], None], what: str
) -> dict[str, list[Run]]:
    """Every loop on every prompt, in orders where each loop follows every other one about equally often."""
    runs: dict[str, list[Run]] = {loop.name: [] for loop in loops}
    sequence = orders(len(loops))
    for count, prompt in enumerate(prompts):
        for index in sequence[count % len(sequence)]:
            loop = loops[index]
            say(f"{what}, prompt {count + 1} of {len(prompts)}: {loop.name}")
            runs[loop.name].append(loop.run(prompt.ids, new_tokens))
    return runs


def gaps(model: Any, prompt: Tensor, ids: Sequence[int]) -> Tensor:
    """How clear each choice of `ids` was: the two best logits' distance over the largest |logit|, run op by op."""
    with torch.inference_mode():
        logits = model(torch.cat([prompt, torch.tensor([ids[:-1]], dtype=torch.int64)], 1)).logits[0]
    logits = logits[prompt.shape[1] - 1 :].double()  # [ids, V]
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]) / logits.abs().amax(-1)


def compare(model: Any, prompts: Sequence[Prompt], runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Where loops part from the first one, and how near a tie the choice was there."""
    reference, parted, smallest = next(iter(runs.values())), [], []
    for index, prompt in enumerate(prompts):
        ids = reference[index].ids
        clear = gaps(model, prompt.ids, ids)
        smallest.append(float(clear.min()))
        for name, results in runs.items():
            other = results[index].ids
            if other != ids:
                token = next((i for i, (a, b) in enumerate(zip(ids, other)) if a != b), min(len(ids), len(other)))
                gap = float(clear[token]) if token < len(clear) else None
                parted.append({"loop": name, "prompt": index, "token": token, "gap": gap})
    return {"identical": not parted, "reference": next(iter(runs)), "parted": parted, "smallest_gaps": smallest}


def measure_alone(
    target: Any, draft: Any, trees: Mapping[str, treespec.TokenTree], options: dict[str, Any], prefix: int, rounds: int
) -> dict[str, Any]:
    """Calls outside any loop: the target's verification of each loop's tree, and one level of the draft."""
    programs = {
        "target": treespec.tree_program(target, options=options),
        "draft": treespec.tree_program(draft, options=options),
    }
    torch.manual_seed(0)
    prompt = torch.randint(1, min(p.vocab_size for p in programs.values()), (prefix,))
    caches = {}
    for name, program in programs.items():
        caches[name] = program.new_cache(prefix + 128)
        program.prefill(prompt, caches[name])

    def call(name: str, tree: treespec.TokenTree) -> Callable[[], object]:
        program, cache = programs[name], caches[name]
        return lambda: likeliest(program.verify(tree, cache))

    root = treespec.TokenTree([1], [-1])
    functions = {"decode": call("target", root), "draft": call("draft", root)}
    functions |= {name: call("target", tree) for name, tree in trees.items()}
    with torch.inference_mode():
        return {"prefix": prefix, "seconds": interleave(functions, rounds)}


def typical_tree(loop: Loop, runs: Sequence[Run]) -> treespec.TokenTree:
    """The loop's tree, or where it varies a chain of as many nodes as it had in the mean; arbitrary tokens."""
    expansion = loop.settings["expansion"]
    if expansion is None:
        stats = [run.stats for run in runs if run.stats]
        nodes = sum(s["nodes"] for s in stats) / max(1, sum(s["steps"] for s in stats))
        expansion = [1] * (round(nodes) - 1)
    parents, level = [-1], [0]
    for width in expansion:
        above, level = level, []
        for node in above:
            level += range(len(parents), len(parents) + width)
            parents += [node] * width
    return treespec.TokenTree([1 + i % 100 for i in range(len(parents))], parents)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    options: dict[str, Any] = {"lowering": given.lowering} if given.lowering else {}
    target_model, draft_model = load(_name(given.target)), load(_name(given.draft), role="draft")
    target, draft, tokenizer = target_model.model, draft_model.model, target_model.tokenizer
    prompts = read_prompts(given.prompts_file or default_prompts(given.target), tokenizer)
    measured, calibration = split_prompts(prompts, given.prompts, 0 if given.policy else given.calibration)
    new_tokens = given.max_new_tokens
    room = max(p.ids.shape[1] for p in prompts) + new_tokens
    variants = [STATIC[name] for name in given.static]
    candidates = [] if given.policy else list(dict.fromkeys(given.candidates))

    most = 5 + len(variants) + len(given.policies)  # loops
    total = (len(measured) + 1) * most + len(calibration) * len(candidates) + 2
    with progress(total) as say:
        calibrated, chosen = None, given.policy
        if candidates:
            say("compiling target and draft with treespec")
            tried = [treespec_loop(target, draft, spec, options) for spec in candidates]
            for loop in tried:
                loop.run(calibration[0].ids, new_tokens)
            settle()
            runs = run_all(tried, calibration, new_tokens, say, "choosing the policy")
            seconds = {spec: [r.seconds for r in runs[loop.name]] for spec, loop in zip(candidates, tried)}
            chosen = min(seconds, key=lambda spec: sum(seconds[spec]))
            calibrated = {"prompts": [p.describe() for p in calibration], "seconds": seconds}
        note = " (named)" if given.policy else " (chosen on other prompts)"
        loops = [generate_loop(target), *assisted_loops(target, draft)]
        loops += [static_loop(target, room, variant) for variant in variants]
        loops.append(plain_treespec_loop(target, options))
        loops += [treespec_loop(target, draft, spec, options) for spec in given.policies if spec != chosen]
        headline = treespec_loop(target, draft, chosen, options, note)
        loops.append(headline)
        for loop in loops:
            say(f"warming up (compiling): {loop.name}")
            for _ in range(2):
                loop.run((calibration or measured)[0].ids, new_tokens)
        settle()
        runs = run_all(loops, measured, new_tokens, say, "measuring")
        say("measuring single calls")
        prefix = round(median(p.ids.shape[1] for p in measured)) + new_tokens // 2
        trees = {loop.name: typical_tree(loop, runs[loop.name]) for loop in loops if loop.kind == "treespec"}
        alone = measure_alone(target, draft, trees, options, prefix, given.rounds)
        identity = compare(target, measured, runs)
    if given.profile:
        profile(headline, measured[:4], new_tokens)
    report = {
        "benchmark": "decode",
        "run": describe_run(given.threads),
        "settings": {
            "target": given.target,
            "draft": given.draft,
            "dtype": "float32",
            "new_tokens": new_tokens,
            "lowering": given.lowering or "inductor",
            "headline": headline.name,
        },
        "models": {
            name: {"parameters": sum(p.numel() for p in m.parameters()), "config": m.config.to_diff_dict()}
            for name, m in (("target", target), ("draft", draft))
        },
        "calibration": calibrated,
        "prompts": [p.describe() for p in measured],
        "loops": [loop.describe() for loop in loops],
        "runs": {
            name: [{"seconds": r.seconds, "prefill_seconds": r.prefill_seconds, "stats": r.stats} for r in results]
            for name, results in runs.items()
        },
        "ids": [r.ids for r in runs[loops[0].name]],
        "identity": identity,
        "alone": alone,
    }
    return report | {"summary": summarize(report)}


def _name(model: str) -> str:
    return model if ":" in model or model == "demo" else f"hf:{model}"


def default_prompts(target: str) -> Path:
    """The demo's held-out prompts, or those beside the folder of another pair."""
    beside = Path(target.removeprefix("hf:")).parent / "heldout.json"
    return beside if target != "demo" and beside.is_file() else demo.paths.heldout


def profile(loop: Loop, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Where Python's time goes in one loop. The profiler itself makes small functions look dear."""
    profiler = cProfile.Profile()
    for prompt in prompts:
        profiler.runcall(loop.run, prompt.ids, new_tokens)
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", metavar="MODEL", default="demo", help="demo, a folder, or hf:PATH_OR_ID (default: demo)"
    )
    parser.add_argument("--draft", metavar="MODEL", default="demo", help="likewise; the tokenizer is the target's")
    parser.add_argument("--prompts-file", metavar="FILE", type=Path, help="JSON list of {module, line, text}")
    parser.add_argument("--prompts", metavar="N", type=int, default=24, help="prompts to measure (default: 24)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="for each (default: 128)")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="(default: 2)")
    parser.add_argument("--policy", metavar="P", help="what stands for treespec (default: chosen on other prompts)")
    parser.add_argument("--policies", metavar="P", nargs="*", default=POLICIES, help="measured beside it")
    parser.add_argument("--candidates", metavar="P", nargs="+", default=CANDIDATES, help="to choose from")
    parser.add_argument("--calibration", metavar="N", type=int, default=8, help="prompts to choose on (default: 8)")
    parser.add_argument(
        "--static", metavar="LOOP", nargs="*", choices=STATIC, default=[*STATIC], help=f"of {', '.join(STATIC)}"
    )
    parser.add_argument("--lowering", choices=("inductor", "eager"), help="of treespec's programs")
    parser.add_argument("--rounds", metavar="N", type=int, default=30, help="of single calls (default: 30)")
    parser.add_argument("--profile", action="store_true", help="print where Python's time goes")
    parser.add_argument("--output", metavar="FILE", type=Path, default=RESULTS / "decode.json")
    parser.add_argument("--show", metavar="FILE", type=Path, help="print the tables of an earlier run")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    given = parser.parse_args()
    if given.show:
        report = read_report(given.show, "run", "settings", "loops", "runs", benchmark="decode")
        report["summary"] = summarize(report)
    else:
        report = measure(given)
        write_json(given.output, report)
    show(*tables(report), markdown=given.markdown)
    if not given.show and not report["identity"]["identical"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
