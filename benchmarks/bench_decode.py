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
    Quartiles,
    Table,
    describe_run,
    interleave,
    orders,
    progress,
    read_report,
    settle,
    show,
    write_json,
)
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


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios and the speed identity, from the raw numbers."""
    runs, tokens = report["runs"], report["settings"]["new_tokens"]
    kinds = {loop["name"]: loop["kind"] for loop in report["loops"]}
    seconds = {name: [r["seconds"] for r in results] for name, results in runs.items()}
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    # Seconds a token after the prompt; the first token is the prompt's.
    decoding = {
        name: [(r["seconds"] - r["prefill_seconds"]) / max(1, tokens - 1) for r in results]
        for name, results in runs.items()
        if results[0]["prefill_seconds"] is not None
    }

    def best(kind: str, of: dict[str, list[float]], sign: int) -> str:
        return max((n for n in of if kinds[n] == kind), key=lambda name: sign * median(of[name]))

    bases = {
        "generate": best("generate", rates, 1),
        "assisted": best("assisted", rates, 1),
        "plain": best("plain", rates, 1),
    }
    plain_decoding = best("plain", decoding, -1)

    def ratios(values: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
        """How many times faster than `base`, prompt by prompt."""
        return vars(Quartiles.of([b / own for own, b in zip(values[name], values[base])]))

    return {
        "best": bases,
        "best_plain_while_decoding": plain_decoding,
        "decode_seconds": median(decoding[plain_decoding]),
        "tokens_per_second": {name: vars(Quartiles.of(values)) for name, values in rates.items()},
        "ratios": {name: {kind: ratios(seconds, name, base) for kind, base in bases.items()} for name in runs},
        "decoding_ratios": {name: ratios(decoding, name, plain_decoding) for name in decoding},
        "steps": {
            loop["name"]: step_figures(report, loop, median(decoding[plain_decoding]))
            for loop in report["loops"]
            if loop["kind"] == "treespec"
        },
    }


def step_figures(report: dict[str, Any], loop: dict[str, Any], decode: float) -> dict[str, Any]:
    """One step's parts, and the speed identity: tokens a step over what the step costs in plain decoding steps."""
    runs = report["runs"][loop["name"]]
    stats = [run["stats"] for run in runs]

    def total(name: str) -> float:
        return sum(s[name] for s in stats)

    steps = max(1, total("steps"))
    alone = {name: median(values) for name, values in report["alone"]["seconds"].items()}
    expansion = loop["settings"]["expansion"]
    tokens_per_step = total("step_tokens") / steps
    drafting, verify = total("draft_seconds") / steps, alone[loop["name"]]
    overhead = (total("step_seconds") - total("verify_seconds")) / steps - drafting
    # Where the number of draft calls varies, their time is taken from the loop.
    levels = len(expansion) if expansion else None
    cost = verify + (levels * alone["draft"] if levels else drafting) + overhead
    wall = sum(run["seconds"] for run in runs)
    parts = ("draft_seconds", "verify_seconds", "commit_seconds", "overhead_seconds")
    prompts = ("prefill_seconds", "draft_prefill_seconds")
    return {
        "tokens_per_step": tokens_per_step,
        "nodes_per_step": total("nodes") / steps,
        "acceptance_by_depth": _rates(stats, "accepted_by_depth"),
        "levels": levels,
        "verify_over_decode": {"alone": verify / decode, "in_loop": total("verify_seconds") / steps / decode},
        "draft_over_decode": {"alone": alone["draft"] / decode, "in_loop": drafting / (levels or 1) / decode},
        "overhead_over_decode": overhead / decode,
        "expected_speedup": tokens_per_step * decode / cost,
        "seconds_per_step": {part: total(part) / steps for part in parts},
        "share_of_wall": {part: total(part) / wall for part in (*parts, *prompts)}
        | {"outside_seconds": (wall - total("step_seconds") - sum(map(total, prompts))) / wall},
    }


def _rates(stats: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Accepted given that the parent was, over all runs."""
    depth = max(len(s[name]) for s in stats)
    sums = [
        [sum(s[name][d][key] for s in stats if d < len(s[name])) for key in ("accepted", "tried")] for d in range(depth)
    ]
    return [accepted / tried if tried else 0.0 for accepted, tried in sums]


def tables(report: dict[str, Any]) -> tuple[list[Table], list[str]]:
    """What `--show` prints: tables, and sentences."""
    summary, settings, run = report["summary"], report["settings"], report["run"]
    best, kinds = summary["best"], {loop["name"]: loop["kind"] for loop in report["loops"]}
    parted = {entry["loop"] for entry in report["identity"]["parted"]}
    speed = Table(
        f"{len(report['prompts'])} held-out prompts, {settings['new_tokens']} new tokens each, {settings['dtype']}, "
        f"{run['threads']} threads, {run['device']}: medians and quartiles",
        ("", "tokens/s", "x best plain loop", "decoding only", "x generate", "x assisted", "identical"),
    )
    for name, rate in summary["tokens_per_second"].items():
        ratios = summary["ratios"][name]
        decoding = summary["decoding_ratios"].get(name)
        speed.add(
            name + (" *" if name in best.values() else ""),
            f"{Quartiles(**rate):.0f}",
            f"{Quartiles(**ratios['plain']):.2f}",
            f"{decoding['median']:.2f}" if decoding else "",
            *(f"{ratios[kind]['median']:.2f}" for kind in ("generate", "assisted")),
            "no" if name in parted else "yes",
            bold=name == settings["headline"],
        )
    identity = Table(
        f"Speed identity, in decoding steps of `{summary['best_plain_while_decoding']}` "
        f"({1e3 * summary['decode_seconds']:.3f} ms): alone, and in the loop",
        ("", "tokens/step", "verify(N)", "levels x draft", "overhead", "expected", "measured"),
    )
    time = Table(
        "Microseconds a step, and the rest of the time",
        ("", "draft", "verify", "commit", "other", "prompt, target", "prompt, draft", "outside"),
    )
    for name, figures in summary["steps"].items():
        verify, draft = figures["verify_over_decode"], figures["draft_over_decode"]
        bold = name == settings["headline"]
        identity.add(
            name,
            f"{figures['tokens_per_step']:.2f}",
            f"{verify['alone']:.2f} ({verify['in_loop']:.2f})",
            f"{figures['levels']} x {draft['alone']:.3f} ({draft['in_loop']:.3f})"
            if figures["levels"]
            else f"({draft['in_loop']:.3f})",
            f"{figures['overhead_over_decode']:.3f}",
            f"{figures['expected_speedup']:.2f}",
            f"{summary['decoding_ratios'][name]['median']:.2f}",
            bold=bold,
        )
        step, share = figures["seconds_per_step"], figures["share_of_wall"]
        parts = ("draft_seconds", "verify_seconds", "commit_seconds", "overhead_seconds")
        time.add(
            name,
            *(f"{1e6 * step[part]:.0f} ({share[part]:.0%})" for part in parts),
            *(f"{share[part]:.1%}" for part in ("prefill_seconds", "draft_prefill_seconds", "outside_seconds")),
            bold=bold,
        )
    shown = [speed, identity, time]
    if report["calibration"]:
        shown.append(calibration_table(report))
    fastest = [f"{kind}: {name}" for kind, name in best.items()]
    head = summary["ratios"][settings["headline"]]
    ratios = ", ".join(f"{head[kind]['median']:.2f} x {kind}" for kind in ("plain", "generate", "assisted"))
    notes = [
        f"* compared with, the fastest of their kind by the median: {'; '.join(fastest)}.",
        f"{settings['headline']}: {ratios}. Tokens/s include the prompt; `decoding only` leaves it out on both sides.",
        identity_line(summary, settings["headline"]),
        verdict(report["identity"], kinds),
    ]
    return shown, notes


def calibration_table(report: dict[str, Any]) -> Table:
    calibration = report["calibration"]
    table = Table(
        f"Choice of the policy, on {len(calibration['prompts'])} prompts that are not among the measured ones",
        ("policy", "seconds", "tokens/s"),
    )
    tokens = report["settings"]["new_tokens"]
    for name, seconds in sorted(calibration["seconds"].items(), key=lambda item: sum(item[1])):
        table.add(name, f"{sum(seconds):.3f}", f"{len(seconds) * tokens / sum(seconds):.0f}", bold=not table.rows)
    return table


def identity_line(summary: dict[str, Any], name: str) -> str:
    figures = summary["steps"][name]
    draft = figures["draft_over_decode"]
    drafting = f"{figures['levels']} x {draft['alone']:.3f}" if figures["levels"] else f"{draft['in_loop']:.3f}"
    terms = f"{figures['verify_over_decode']['alone']:.2f} + {drafting} + {figures['overhead_over_decode']:.3f}"
    measured = summary["decoding_ratios"][name]["median"]
    return (
        f"speed identity: {figures['tokens_per_step']:.2f} tokens per step / ({terms}) = "
        f"{figures['expected_speedup']:.2f} expected, {measured:.2f} measured while decoding"
    )


def verdict(identity: dict[str, Any], kinds: dict[str, str]) -> str:
    clearest = f"the nearest tie of all choices: {min(identity['smallest_gaps']):.1e} of the largest logit"
    if identity["identical"]:
        return f"identical: yes ({len(kinds)} loops; {clearest})"
    places = "; ".join(
        f"{p['loop']}, prompt {p['prompt']}, token {p['token']}"
        + ("" if p["gap"] is None else f", a gap of {p['gap']:.1e}")
        for p in identity["parted"]
    )
    return f"identical: no. Parted from {identity['reference']} at: {places} ({clearest})"


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
