"""Pictures of bench_policies as SVG, written by hand: acceptance by depth and rank, and the trees that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CELL, MARGIN, GAP = 46, 60, 40
STYLE = "<style>text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.n{fill:#2b6cb0}.e{stroke:#999}</style>"


def picture(
    title: str, acceptance: Mapping[str, Sequence[Sequence[float | None]]], trees: Mapping[str, Sequence[int]]
) -> str:
    """`acceptance`: title -> [depth][rank] of rates given an accepted parent (None: not seen); `trees`: -> parents."""
    parts, x, height = [], MARGIN, 0
    for name, rows in acceptance.items():
        part, width, tall = _grid(name, rows, x, MARGIN)
        parts.append(part)
        x, height = x + width + GAP, max(height, tall)
    top, x, tallest = MARGIN + height + 2 * GAP, MARGIN, 0
    widest = MARGIN
    for name, parents in trees.items():
        part, width, tall = _tree(name, parents, x, top)
        parts.append(part)
        x, tallest = x + width + GAP, max(tallest, tall)
    widest = max(x, MARGIN + sum(CELL * max(map(len, r), default=1) + MARGIN + GAP for r in acceptance.values()))
    size = f'width="{widest}" height="{top + tallest + GAP}"'
    heading = f'<text class="t" x="{MARGIN}" y="24">{title}</text>'
    body = f'{STYLE}<rect {size} fill="white"/>{heading}{"".join(parts)}'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>\n'


def _grid(name: str, rows: Sequence[Sequence[float | None]], x: int, y: int) -> tuple[str, int, int]:
    """A heat map: one row a depth, one column a rank."""
    ranks = max(map(len, rows), default=0)
    parts = [f'<text class="t" x="{x}" y="{y}">{name}</text>']
    parts += [f'<text x="{x + 40 + CELL * r}" y="{y + 18}">rank {r}</text>' for r in range(ranks)]
    for d, row in enumerate(rows):
        top = y + 26 + CELL * d
        parts.append(f'<text x="{x - 20}" y="{top + 27}">depth {d + 1}</text>')
        for r, rate in enumerate(row):
            if rate is None:
                continue
            left, shade = x + 34 + CELL * r, round(255 - 170 * rate)
            ink = ' style="fill:white"' if rate > 0.75 else ""
            parts.append(
                f'<rect x="{left}" y="{top}" width="{CELL - 3}" height="{CELL - 3}" fill="rgb({shade},{shade},255)"/>'
                f'<text x="{left + 8}" y="{top + 26}"{ink}>{rate:.2f}</text>'
            )
    return "".join(parts), 34 + CELL * ranks, 26 + CELL * len(rows)


def _tree(name: str, parents: Sequence[int], x: int, y: int) -> tuple[str, int, int]:
    """Roots at the left, levels to the right, leaves evenly spaced."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    row: dict[int, float] = {}
    leaves = 0
    for node in sorted(range(len(parents)), reverse=True):  # children before parents
        if node not in children:
            row[node] = -1.0
    stack = [(0, False)]
    while stack:
        node, done = stack.pop()
        if node not in children:
            row[node], leaves = float(leaves), leaves + 1
        elif done:
            row[node] = sum(row[c] for c in children[node]) / len(children[node])
        else:
            stack.append((node, True))
            stack += [(child, False) for child in reversed(children[node])]
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    place = {n: (x + 8 + 34 * depths[n], y + 20 + round(18 * row[n])) for n in range(len(parents))}
    edges = [
        f'<line class="e" x1="{place[p][0]}" y1="{place[p][1]}" x2="{place[n][0]}" y2="{place[n][1]}"/>'
        for n, p in enumerate(parents)
        if p >= 0
    ]
    nodes = [f'<circle class="n" cx="{a}" cy="{b}" r="5"/>' for a, b in place.values()]
    label = f'<text class="t" x="{x}" y="{y}">{name}</text>'
    width = max(34 * max(depths) + 16, 8 * len(name))
    return "".join([label, *edges, *nodes]), width, 20 + 18 * max(1, leaves)
