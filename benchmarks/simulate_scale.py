"""What a step would take across GPUs: CALCULATED, not measured, from single-GPU figures and published links.

    python benchmarks/simulate_scale.py [--output FILE] [--chart FILE.svg] [--markdown]
    python benchmarks/simulate_scale.py --show FILE

A step of one GPU is `layers x a + bytes x r`: `a` and `r` are solved, for each number of nodes, from the two models
that were measured on an H200 (results/nvidia-h200/gpu_suite.json). Ranks that share layers read 1/tp of the weights and
K/V and pay two all_reduces a layer; stages pay one hand-over each. Nothing here ran on several GPUs.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common import Table, describe_run, read_report, show, write_json

BENCHMARK = "simulate_scale"
MEASURED = Path(__file__).parent / "results" / "nvidia-h200" / "gpu_suite.json"
MEMORY = 141e9
"""Bytes of an H200 (NVIDIA's data sheet)."""
ITEM, CONTEXT = 2, 2048
"""Bytes of a bfloat16 number; committed tokens before a step."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder; `experts` of `inner` features, of which each token takes `taken`; one of them: a dense MLP."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    experts: int = 1
    taken: int = 1

    @property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        return self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def weights(self, nodes: int | None = None) -> float:
        """Bytes of weights; with `nodes`, those that a step of so many reads: experts are taken evenly, by chance."""
        expert = 3 * self.width * self.inner
        read = self.experts if nodes is None else self.experts * (1 - (1 - self.taken / self.experts) ** nodes)
        tables = self.vocab * self.width * (2 if nodes is None else 1)  # a step reads the head, and rows of the table
        return ITEM * (self.layers * (self.attention + read * expert) + tables)

    @property
    def kept(self) -> float:
        """Bytes of K/V behind which a step runs."""
        return 2 * ITEM * self.layers * self.kv_heads * self.head_dim * CONTEXT


SHAPES = (
    Shape("Llama 8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("Llama 70B", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape("MoE of 100B", 46, 4096, 64, 8, 128, 1408, 151552, experts=128, taken=8),
)


@dataclass(frozen=True)
class Link:
    """`hop`: seconds of one step of a ring; `rate`: bytes a second in one direction, as published."""

    name: str
    hop: float
    rate: float
    source: str


# Hops: NCCL's own tuning model (src/graph/tuning.cc at 01afd20, hwLat, ring with protocol LL), which adds 3.6 us for
# each call, and takes a quarter of the link's rate for an all_reduce in this protocol.
CALL, LL_SHARE = 3.6e-6, 0.25
LINKS = (
    Link("NVLink 4", 0.47e-6, 450e9, "NVIDIA H200 data sheet: 900 GB/s in both directions together"),
    Link("PCIe 5 x16", 1.0e-6, 64e9, "NVIDIA H200 data sheet: 128 GB/s in both directions together"),
    Link("InfiniBand NDR", 2.7e-6, 50e9, "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port"),
)


@dataclass(frozen=True)
class Fit:
    """Seconds of a layer and of a byte on one GPU, by the number of new nodes."""

    nodes: Sequence[int]
    layer: Sequence[float]
    byte: Sequence[float]

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Fit:
        """From the steps of an 8B and a 1B shape behind 2048 tokens."""
        (big, small) = (report["sections"][name] for name in ("step 8B", "step 1B"))
        sizes, steps = [], []
        for section in (big, small):
            case = next(c for c in section["cases"] if c["batch"] == 1 and c["context"] == CONTEXT)
            sizes.append((section["shape"]["layers"], section["weight_bytes"] + case["kv_bytes"]))
            steps.append({int(n): ms / 1e3 for n, ms in case["step_ms"].items()})
        (l1, b1), (l2, b2) = sizes
        nodes, layer, byte = sorted(steps[0]), [], []
        for n in nodes:
            rate = (steps[0][n] * l2 - steps[1][n] * l1) / (b1 * l2 - b2 * l1)
            byte.append(rate)
            layer.append((steps[0][n] - b1 * rate) / l1)
        return cls(nodes, layer, byte)

    def at(self, nodes: int) -> tuple[float, float]:
        """Between the numbers of nodes that were measured, on a line."""
        after = min(max(bisect_left(self.nodes, nodes), 1), len(self.nodes) - 1)
        low, high = self.nodes[after - 1], self.nodes[after]
        share = (nodes - low) / (high - low)
        pairs = ((values[after - 1], values[after]) for values in (self.layer, self.byte))
        layer, byte = (first + share * (second - first) for first, second in pairs)
        return layer, byte


def all_reduce(link: Link, ranks: int, size: float) -> float:
    """Seconds: a ring's hops, and its bytes at the protocol's share of the rate."""
    hops = 2 * (ranks - 1)
    return 0.0 if ranks == 1 else CALL + hops * link.hop + hops / ranks * size / (LL_SHARE * link.rate)


def all_gather(link: Link, ranks: int, size: float) -> float:
    """Seconds, of `size` bytes that all ranks hold afterwards."""
    hops = ranks - 1
    return 0.0 if ranks == 1 else CALL + hops * link.hop + hops / ranks * size / (LL_SHARE * link.rate)


@dataclass(frozen=True)
class Step:
    """One mesh: seconds of a step by what they go to, bytes of a rank, tokens a second."""

    model: str
    tp: int
    pp: int
    within: str
    between: str
    nodes: int
    compute: float
    collectives: float
    handed: float
    bytes: float
    plain: float
    """Tokens a second of one request without a draft, one node a step."""
    tree: float
    """The same with the draft's trees."""

    @property
    def seconds(self) -> float:
        return self.compute + self.collectives + self.handed


def parts(shape: Shape, fit: Fit, tp: int, pp: int, nodes: int, within: Link, between: Link) -> tuple[float, ...]:
    """Seconds of computing, of collectives, and of hand-overs, one request in flight: stages wait for each other."""
    layer, byte = fit.at(nodes)
    compute = shape.layers * layer + (shape.weights(nodes) + shape.kept) / tp * byte
    row = nodes * shape.width * ITEM
    collectives = 2 * shape.layers * all_reduce(within, tp, row)
    collectives += all_gather(within, tp, nodes * shape.vocab * ITEM)
    handed = (pp - 1) * (CALL + between.hop + row / tp / (LL_SHARE * between.rate)) if pp > 1 else 0.0
    return compute, collectives, handed


def step(shape: Shape, fit: Fit, mesh: tuple[int, int], links: tuple[Link, Link], draft: Mapping[str, Any]) -> Step:
    """`draft`: nodes and tokens of a step by its trees, and seconds that drafting one takes."""
    tp, pp = mesh
    compute, collectives, handed = parts(shape, fit, tp, pp, draft["nodes"], *links)
    whole = compute + collectives + handed
    size = (shape.weights() + shape.kept) / (tp * pp)
    plain = 1 / sum(parts(shape, fit, tp, pp, 1, *links))
    tree = draft["tokens_per_step"] / (whole + draft["seconds"])
    within, between = links[0].name if tp > 1 else "", links[1].name if pp > 1 else ""
    return Step(shape.name, tp, pp, within, between, draft["nodes"], compute, collectives, handed, size, plain, tree)


def simulate(report: Mapping[str, Any]) -> dict[str, Any]:
    """Every mesh of every shape over every link within a node; stages are linked by InfiniBand."""
    fit = Fit.of(report)
    best = max(report["projection"], key=lambda row: row["speedup"])
    case = next(c for c in report["sections"]["step 1B"]["cases"] if c["batch"] == 1 and c["context"] == CONTEXT)
    draft = {**best, "seconds": best["draft_steps"] * case["step_ms"]["1"] / 1e3}
    steps = []
    for shape, pp, tp in product(SHAPES, (1, 2, 4), (1, 2, 4, 8)):
        for within in LINKS[:2] if tp > 1 else LINKS[:1]:
            steps.append(step(shape, fit, (tp, pp), (within, LINKS[2]), draft))
    return {
        "benchmark": BENCHMARK,
        "status": "calculated, not measured",
        "from": {name: report["run"][name] for name in ("date", "commit", "device", "command")},
        "assumptions": assumptions(fit, draft),
        "links": [asdict(link) for link in LINKS],
        "draft": draft,
        "fit": asdict(fit),
        "steps": [asdict(each) | {"seconds": each.seconds, "fits": each.bytes < MEMORY} for each in steps],
    }


def assumptions(fit: Fit, draft: Mapping[str, Any]) -> list[str]:
    layer, byte = fit.at(1)
    return [
        "CALCULATED, not measured: no step of these ran on more than one GPU.",
        f"One GPU: {layer * 1e6:.0f} us a layer and {1 / byte / 1e12:.2f} TB/s for one node, solved from the 8B and 1B "
        "steps measured on an H200; the time of a layer is taken to stay the same on every rank and at every width.",
        "Weights, K/V and the head are divided evenly; norms and routers, which are whole on each rank, are left out.",
        "Collectives and computing do not overlap; a ring in NCCL's protocol LL, by NCCL's own tuning model: 3.6 us a "
        "call, hops and rates by link, a quarter of the rate. NVLS and one-shot all_reduce would take less.",
        "One request in flight: stages wait for each other. With as many groups of requests in flight as stages, "
        "tokens a second of all together are at most pp times as many.",
        f"The draft runs alone on one GPU: {draft['draft_steps']} steps of the measured 1B. {draft['policy']}: "
        f"{draft['nodes']} nodes, {draft['tokens_per_step']:.2f} tokens a step, the acceptance of the pair that "
        "gpu_suite.json's projection was made with; other pairs accept other numbers.",
        f"Experts are taken evenly and by chance, {CONTEXT} committed tokens, bfloat16.",
    ]


def tables(report: Mapping[str, Any]) -> list[Table]:
    found = []
    headings = ("mesh", "links", "GB a rank", "compute ms", "collectives ms", "hand-over ms", "tokens/s", "with trees")
    for name in dict.fromkeys(row["model"] for row in report["steps"]):
        table = Table(f"{name}, calculated: a step of {report['draft']['nodes']} nodes", headings)
        for row in (r for r in report["steps"] if r["model"] == name):
            links = ", ".join(filter(None, (row["within"], row["between"])))
            cells = [f"tp={row['tp']},pp={row['pp']}", links or "-", f"{row['bytes'] / 1e9:.1f}"]
            if row["fits"]:
                cells += [f"{1e3 * row[part]:.2f}" for part in ("compute", "collectives", "handed")]
                cells += [f"{row['plain']:.0f}", f"{row['tree']:.0f}"]
            else:
                cells += ["does not fit", *[""] * 4]
            table.add(*cells)
        found.append(table)
    return found


STYLE = "<style>text{font:12px sans-serif;fill:#222}.t{font-weight:bold}</style>"
INK = {"compute": "#2b6cb0", "collectives": "#dd6b20", "handed": "#718096"}


def chart(report: Mapping[str, Any]) -> str:
    """Seconds of a step as bars, NVLink within a node; SVG, which says that it was calculated."""
    rows = [r for r in report["steps"] if r["within"] in ("", LINKS[0].name) and r["fits"]]
    widest = max(r["seconds"] for r in rows)
    body = ['<text class="t" x="20" y="24">Milliseconds of a step: calculated, not measured</text>']
    for i, (part, ink) in enumerate(INK.items()):
        body.append(f'<rect x="{20 + 130 * i}" y="36" width="12" height="12" fill="{ink}"/>')
        body.append(f'<text x="{38 + 130 * i}" y="47">{part}</text>')
    y, model = 64, ""
    for row in rows:
        if row["model"] != model:
            model, y = row["model"], y + 22
            body.append(f'<text class="t" x="20" y="{y}">{model}</text>')
            y += 8
        body.append(f'<text x="20" y="{y + 13}">tp={row["tp"]}, pp={row["pp"]}</text>')
        x = 120.0
        for part, ink in INK.items():
            width = 600 * row[part] / widest
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="16" fill="{ink}"/>')
            x += width
        body.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{1e3 * row["seconds"]:.2f}</text>')
        y += 20
    size = f'width="800" height="{y + 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}<rect {size} fill="white"/>{"".join(body)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="a report of gpu_suite.py")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--chart", type=Path, help="SVG")
    parser.add_argument("--show", type=Path, help="print the tables of such a JSON file")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.show is not None:
        report: dict[str, Any] = read_report(arguments.show, "steps", "assumptions", benchmark=BENCHMARK)
    else:
        report = simulate(json.loads(arguments.measured.read_text(encoding="utf-8")))
        report["run"] = describe_run(1)
    if arguments.output is not None:
        write_json(arguments.output, report)
    if arguments.chart is not None:
        arguments.chart.write_text(chart(report), encoding="utf-8")
    sources = [f"{link['name']}: {link['source']}." for link in report["links"]]
    show(tables(report), [*report["assumptions"], *sources], arguments.markdown)


if __name__ == "__main__":
    main()
