"""Tables of a run, aims beside them, and what the figures would mean for a pair of 8B and 1B."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from common import Table

RECORDED = Path(__file__).parents[1] / "results" / "cpu" / "policies.json"

AIMS = {
    "verify(64) / decode(1), 8B, batch 1, context 2048": ("<=", 1.10),
    "step / weight-read floor, 8B, batch 1, context 2048": ("<=", 1.25),
    "attention of copy bandwidth, 32768 tokens, N <= 64": (">=", 0.85),
    "over flash decoding, N = 1, 32768 tokens": (">=", 0.90),
    "over FlexAttention, N = 64, 32768 tokens": (">=", 2.0),
    "over dense-mask SDPA, N = 64, 32768 tokens": (">=", 3.0),
    "cold compile of 8B, seconds": ("<=", 60.0),
    "warm compile of 8B, seconds": ("<=", 10.0),
}


def aims(sections: dict[str, Any]) -> dict[str, float]:
    """What each aim speaks of; NaN where it was not measured."""
    found = dict.fromkeys(AIMS, math.nan)
    names = list(AIMS)
    for case in sections.get("step 8B", {}).get("cases", []):
        if (case["batch"], case["context"]) == (1, 2048):
            found[names[0]], found[names[1]] = case["verify_over_decode"]["64"], case["over_floor"]["1"]
    long = [s for s in sections.get("attention", {}).get("sizes", []) if s["context"] == 32768]
    found[names[2]] = min((s["of_copy"] for s in long if s["nodes"] <= 64), default=math.nan)
    for size in long:
        if size["nodes"] == 1:
            found[names[3]] = fastest(size, "flash decoding")
        if size["nodes"] == 64:
            found[names[4]], found[names[5]] = fastest(size, "flex attention"), fastest(size, "sdpa dense mask")
    first, again = (sections.get(s, {}).get("compile_seconds", {}) for s in ("step 8B", "compile again"))
    if first.get("caches") == "new":  # else it may have been warm, and without it `compile again` is cold
        found[names[6]], found[names[7]] = first["all"], again.get("all", math.nan)
    return found


def fastest(size: dict[str, Any], prefix: str) -> float:
    """Our speedup over the best of these contenders."""
    speedups = [s for name, s in size["speedup"].items() if name.startswith(prefix) and not math.isnan(s)]
    return min(speedups, default=math.nan)


def met(name: str, value: float) -> str:
    relation, aim = AIMS[name]
    if math.isnan(value):
        return "not measured"
    return "yes" if (value <= aim if relation == "<=" else value >= aim) else "no"


def tables(found: dict[str, Any]) -> list[Table]:
    sections = found["sections"]
    made = [_status(sections), *([_aims(sections)] if found["status"] == "measured" else [])]
    made += [t for t in (_checks(sections), _attention(sections), *_steps(sections)) if t]
    made += [t for t in (_programs(sections), _variants(sections), _splits(sections), _decode(sections)) if t]
    return made + ([_projection(found["projection"])] if found.get("projection") else [])


def notes(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['run']['device']}, {found['run']['date']}, {found.get('seconds', 0):.0f} s in all"]
    if found["status"] == "smoke":
        lines.insert(0, "A smoke run: tiny sizes, no GPU, no figures.")
    for name, section in found["sections"].items():
        lines += [f"{name}: skipped {s['what']}: {s['why']}" for s in section.get("skipped", [])]
        if section.get("error"):
            lines.append(f"{name}: {section['error'].splitlines()[-1]}")
    return [*lines, outcome(found["sections"])]


def checks(sections: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was compared with a reference, as (kind, row)."""
    kinds = {"kernel": "kernels", "path oracle": "models"}
    return [(kind, row) for kind, rows in kinds.items() for s in sections.values() for row in s.get(rows, [])]


def failures(sections: dict[str, Any]) -> tuple[int, int]:
    """How many sections did not end well, and how many checks found something wrong."""
    unfinished = sum(section["status"] != "done" for section in sections.values())
    return unfinished, sum(not row["ok"] for _, row in checks(sections))


def outcome(sections: dict[str, Any]) -> str:
    unfinished, wrong = failures(sections)
    return f"{unfinished} of {len(sections)} sections not done, {wrong} of {len(checks(sections))} checks wrong"


def _status(sections: dict[str, Any]) -> Table:
    table = Table("Sections", ("section", "status", "seconds"))
    for name, section in sections.items():
        table.add(name, section["status"], f"{section.get('seconds', 0):.0f}", bold=section["status"] != "done")
    return table


def _aims(sections: dict[str, Any]) -> Table:
    table = Table("Aims", ("what", "aim", "measured", "met"))
    for name, value in aims(sections).items():
        relation, aim = AIMS[name]
        table.add(name, f"{relation} {aim:g}", "-" if math.isnan(value) else f"{value:.3g}", met(name, value))
    return table


def _checks(sections: dict[str, Any]) -> Table | None:
    rows = checks(sections)
    table = Table("Against the references", ("what", "of", "error", "tolerance", "right"))
    for kind, row in rows:
        error = row["error"] if isinstance(row["error"], str) else f"{row['error']:.1e}"
        name = f"{row['name']}, {row['lowering']}" if "lowering" in row else row["name"]
        right = "yes" if row["ok"] else "NO"
        table.add(name, kind, error[:40], f"{row.get('tolerance', 0):.0e}", right, bold=not row["ok"])
    return table if rows else None


def _attention(sections: dict[str, Any]) -> Table | None:
    sizes = sections.get("attention", {}).get("sizes", [])
    table = Table(
        "Tree attention, 32 heads over 8, dim 128, bf16",
        ("context, nodes", "us", "GB/s", "of copy", "over flash", "over dense SDPA", "over Flex"),
    )
    for size in sorted(sizes, key=lambda s: (s["context"], s["nodes"])):
        ms = size["milliseconds"]["treespec"]
        speedups = [fastest(size, p) for p in ("flash decoding", "sdpa dense mask", "flex attention")]
        table.add(
            f"{size['context']}, {size['nodes']}",
            f"{1e3 * ms:.1f}",
            f"{size['bytes'] / ms / 1e6:.0f}",
            f"{size['of_copy']:.2f}",
            *("-" if math.isnan(s) else f"{s:.2f}" for s in speedups),
        )
    return table if sizes else None


def _steps(sections: dict[str, Any]) -> list[Table]:
    made = []
    for size in ("8B", "1B"):
        section = sections.get(f"step {size}", {})
        if not section.get("cases"):
            continue
        nodes = list(section["cases"][0]["step_ms"])
        table = Table(
            f"Llama {size} shape, bf16: verify(N) / decode(1)", ("batch, context", "decode ms", "of floor", *nodes)
        )
        for case in section["cases"]:
            table.add(
                f"{case['batch']}, {case['context']}",
                f"{case['step_ms']['1']:.3f}",
                f"{case['over_floor']['1']:.2f}",
                *(f"{case['verify_over_decode'][n]:.2f}" for n in nodes),
            )
        made.append(table)
    return made


def _programs(sections: dict[str, Any]) -> Table | None:
    """What it takes until the first step, and memory."""
    headings = ("section", "capture s", "conversion s", "first step s", "compiled again", "recorded", "peak GB")
    table = Table("Compilation and memory", headings)
    for name, section in sections.items():
        seconds = section.get("compile_seconds")
        if seconds:
            peak = max((case["peak_bytes"] for case in section.get("cases", [])), default=0)
            table.add(
                f"{name}, {seconds['caches']} caches",
                *(f"{seconds[part]:.1f}" for part in ("capture", "convert", "all")),
                str(section.get("recompiles", "-")),
                str(section.get("graphs", {}).get("captures", "-")),
                f"{peak / 1e9:.1f}" if peak else "-",
            )
    return table if table.rows else None


def _variants(sections: dict[str, Any]) -> Table | None:
    section = sections.get("variants", {})
    table = Table("Llama 8B shape, bf16: what could be the default", ("of", "variant", "ms"))
    for row in section.get("steps", []):
        for name, ms in row["step_ms"].items():
            table.add(f"a step behind {row['context']}", f"{name} nodes", f"{ms:.3f}")
    for row in section.get("prompts", []):
        for name, ms in row["prefill_ms"].items():
            table.add(f"a prompt of {row['tokens']}", name, f"{ms:.2f}")
    return table if section.get("steps") or section.get("prompts") else None


def _splits(sections: dict[str, Any]) -> Table | None:
    sweeps = sections.get("splits", {}).get("sweeps", [])
    headings = ("context, nodes", "best", "us", "chosen", "us", "not shared, us")
    table = Table("How many programs share the committed tokens", headings)
    for sweep in sweeps:
        us = sweep["us"]
        best = min(us, key=us.__getitem__)
        chosen = str(sweep["chosen"])
        alone = f"{us['1']:.1f}" if "1" in us else "-"
        name = f"{sweep['context']}, {sweep['nodes']}"
        table.add(name, best, f"{us[best]:.1f}", chosen, f"{us[chosen]:.1f}", alone)
    return table if sweeps else None


def _decode(sections: dict[str, Any]) -> Table | None:
    loops = sections.get("decode", {}).get("loops", [])
    table = Table("The shipped pair, float32", ("loop", "tokens/s", "tokens a step", "identical ids"))
    for loop in loops:
        per_step = f"{loop['tokens_per_step']:.2f}" if "tokens_per_step" in loop else "1"
        same = {True: "yes", False: "NO"}.get(loop.get("identical"), "-")  # type: ignore[arg-type]
        table.add(loop["name"], f"{loop['tokens_per_second']:.0f}", per_step, same)
    return table if loops else None


def projection(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """NOT measured: 8B verified with a 1B draft, if the pair agreed as the shipped pair did in `policies.json`.

    speedup = tokens per step / (verify(N) / decode + draft steps x draft / decode), with this run's steps.
    """
    cases = {}
    for size in ("8B", "1B"):
        for case in sections.get(f"step {size}", {}).get("cases", []):
            if (case["batch"], case["context"]) == (1, 2048):
                cases[size] = case["step_ms"]
    if len(cases) < 2 or not RECORDED.is_file():
        return []
    recorded = json.loads(RECORDED.read_text())["entries"]
    found = []
    for entry in recorded:
        if entry["draft"] != "model" or entry["temperature"] != 0.0 or entry["policy"] == "auto":
            continue
        nodes = max(2, round(entry["nodes_per_step"]))
        padded = str(min(64, 1 << (nodes - 1).bit_length()))
        levels = draft_levels(entry["policy"], nodes)
        decode = cases["8B"]["1"]
        cost = cases["8B"][padded] / decode + levels * cases["1B"]["4"] / decode
        found.append(
            {
                "policy": entry["policy"],
                "tokens_per_step": entry["tokens_per_step"],
                "nodes": nodes,
                "draft_steps": levels,
                "speedup": entry["tokens_per_step"] / cost,
            }
        )
    return found


def draft_levels(policy: str, nodes: int) -> int:
    """Calls of the draft for a tree: one a level below the root."""
    if chain := re.match(r"chain:(\d+)", policy):
        return int(chain[1])
    if re.fullmatch(r"<?\d+(,\d+)*>?", policy):  # children of a node, level by level
        return policy.count(",") + 1
    return nodes - 1  # grown node by node at worst


def _projection(rows: list[dict[str, Any]]) -> Table:
    title = "PROJECTION, not measured: 8B with a 1B draft that agrees as the shipped pair does"
    table = Table(title, ("policy", "tokens a step", "nodes", "draft steps", "speedup"))
    for row in rows:
        table.add(
            row["policy"], f"{row['tokens_per_step']:.2f}", str(row["nodes"]), str(row["draft_steps"]),
            f"{row['speedup']:.2f}",
        )  # fmt: skip
    return table
