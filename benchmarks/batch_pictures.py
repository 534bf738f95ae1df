"""The chart of bench_batch as SVG, written by hand: tokens a second by the number of requests, in all and of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, MARGIN, GAP = 460, 300, 60, 70
COLOURS = ("#444444", "#2b6cb0", "#2f855a", "#c53030", "#b7791f", "#805ad5")
STYLE = "<style>text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.g{stroke:#ddd}path{fill:none}</style>"


def picture(title: str, sizes: Sequence[int], loops: Mapping[str, Sequence[float | None]]) -> str:
    """`loops`: name -> tokens a second of all requests together, for each of `sizes`; None: not measured."""
    each = {
        name: [None if value is None else value / size for value, size in zip(values, sizes, strict=True)]
        for name, values in loops.items()
    }
    panels = _panel("tokens/s of all requests", sizes, loops, MARGIN) + _panel(
        "tokens/s of each request", sizes, each, MARGIN + WIDTH + GAP
    )
    legend = "".join(
        f'<rect x="{MARGIN}" y="{MARGIN + HEIGHT + 50 + 18 * i}" width="12" height="12" fill="{_colour(i)}"/>'
        f'<text x="{MARGIN + 18}" y="{MARGIN + HEIGHT + 61 + 18 * i}">{name}</text>'
        for i, name in enumerate(loops)
    )
    size = f'width="{2 * (MARGIN + WIDTH) + GAP}" height="{MARGIN + HEIGHT + 70 + 18 * len(loops)}"'
    heading = f'<text class="t" x="{MARGIN}" y="24">{title}</text>'
    body = f'{STYLE}<rect {size} fill="white"/>{heading}{panels}{legend}'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>\n'


def _panel(title: str, sizes: Sequence[int], loops: Mapping[str, Sequence[float | None]], left: int) -> str:
    """Lines over a logarithmic axis of requests."""
    top = max((value for values in loops.values() for value in values if value is not None), default=1.0)
    step = _step(top)
    marks = [step * i for i in range(int(top / step) + 2)]
    widest = max(1.0, math.log2(max(sizes) / min(sizes)))

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + WIDTH * math.log2(sizes[index] / min(sizes)) / widest
        return round(x, 1), round(MARGIN + HEIGHT * (1 - value / marks[-1]), 1)

    parts = [f'<text class="t" x="{left}" y="{MARGIN - 14}">{title}</text>']
    for mark in marks:
        y = place(0, mark)[1]
        parts.append(f'<line class="g" x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{mark:g}</text>')
    for index, size in enumerate(sizes):
        parts.append(f'<text x="{place(index, 0)[0]}" y="{MARGIN + HEIGHT + 18}" text-anchor="middle">{size}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{MARGIN + HEIGHT + 36}" text-anchor="middle">requests</text>')
    for number, values in enumerate(loops.values()):
        points = [place(index, value) for index, value in enumerate(values) if value is not None]
        path = " ".join(f"{'L' if i else 'M'}{x},{y}" for i, (x, y) in enumerate(points))
        parts.append(f'<path d="{path}" stroke="{_colour(number)}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{_colour(number)}"/>' for x, y in points]
    return "".join(parts)


def _step(top: float) -> float:
    """A round number of which four to ten make the whole."""
    unit = 10.0 ** math.floor(math.log10(top / 4))
    return next(unit * k for k in (1, 2, 5, 10) if top / (unit * k) <= 8)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
