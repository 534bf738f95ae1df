"""Summaries and tables of a run of bench_decode.py: medians, ratios, the speed identity, and what parted where."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from common import Quartiles, Table


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
