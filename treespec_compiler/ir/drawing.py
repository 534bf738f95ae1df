"""Masks and token trees as SVG, for notebooks and the report. Colours work on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

SEEN, PREFIX, HIDDEN, LINE, TEXT = "#3b82f6", "#93c5fd", "#8884", "#888", "#888"
ROW = 28  # pixels between leaves
ACCEPTED, ROOT = "#16a34a", "#3b82f6"


def mask_svg(visible: Sequence[Sequence[bool]], title: str, prefix: int = 0, cell: int = 9) -> str:
    """A mask as a picture: a row a query, a column a key; the first `prefix` columns are committed tokens."""
    rows, columns = len(visible), len(visible[0]) if visible else 0
    left, top = 14, 16
    parts = [_open(left + columns * cell + 2, top + rows * cell + 2, title)]
    parts.append(f'<text x="{left}" y="11" font-size="9" fill="{TEXT}">keys →</text>')
    parts.append(
        f'<text x="9" y="{top}" font-size="9" fill="{TEXT}" transform="rotate(90 9 {top})" dy="4">queries →</text>'
    )
    for q, row in enumerate(visible):
        for k, seen in enumerate(row):
            fill = (PREFIX if k < prefix else SEEN) if seen else HIDDEN
            x, y = left + k * cell, top + q * cell
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"/>')
    return "".join([*parts, "</svg>"])


def predicate_mask(visible: Callable[[int, int], bool], size: int) -> list[list[bool]]:
    return [[visible(q, k) for k in range(size)] for q in range(size)]


def tree_mask(parents: Sequence[int], prefix: int, visible: Callable[[int, int], bool]) -> list[list[bool]]:
    """The topology mask of a tree after `prefix` tokens: ancestors, as far as the predicate on positions shows them."""
    depth: list[int] = []
    above: list[set[int]] = []
    for node, parent in enumerate(parents):
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
        above.append((above[parent] if parent >= 0 else set()) | {node})
    rows = []
    for node in range(len(parents)):
        at = prefix + depth[node]
        committed = [visible(at, k) for k in range(prefix)]
        rows.append(committed + [k in above[node] and visible(at, prefix + depth[k]) for k in range(len(parents))])
    return rows


def tree_svg(
    tokens: Sequence[int],
    parents: Sequence[int],
    label: Callable[[int], str] = str,
    accepted: Iterable[int] = (),
    node_attributes: Callable[[int], str] = lambda node: "",
) -> str:
    """A token tree from left to right; accepted nodes are green."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    place: dict[int, tuple[int, float]] = {}
    leaves = 0
    # Parents come before their children: bottom up, a parent stands in the middle of its children.
    order: list[tuple[int, int]] = []
    stack = [(root, 0) for root in reversed(children.get(-1, []))]
    while stack:
        node, depth = stack.pop()
        order.append((node, depth))
        stack.extend((c, depth + 1) for c in reversed(children.get(node, [])))
    for node, depth in order:
        if node not in children:
            place[node] = (depth, leaves)
            leaves += 1
    for node, depth in reversed(order):
        if node in children:
            spots = [place[c][1] for c in children[node]]
            place[node] = (depth, (spots[0] + spots[-1]) / 2)
    texts = {node: label(token) for node, token in enumerate(tokens)}
    wide = 30 + 7 * max((len(t) for t in texts.values()), default=1)
    deepest = max((d for d, _ in place.values()), default=0)
    green = set(accepted)
    left = 6 + wide // 3
    parts = [_open(left + 6 + deepest * wide + wide // 3, 10 + leaves * ROW, f"token tree of {len(tokens)} nodes")]
    for node, parent in enumerate(parents):
        if parent >= 0:
            (d0, y0), (d1, y1) = place[parent], place[node]
            color = ACCEPTED if node in green and parent in green else LINE
            start, end = f"{left + d0 * wide} {20 + y0 * ROW}", f"{left + d1 * wide} {20 + y1 * ROW}"
            parts.append(f'<path d="M{start} L{end}" stroke="{color}" fill="none"/>')
    for node, (depth, spot) in sorted(place.items()):
        fill = ACCEPTED if node in green else ROOT
        x, y = left + depth * wide, 20 + spot * ROW
        parts.append(f'<g class="tree-node" {node_attributes(node)}><circle cx="{x}" cy="{y}" r="5" fill="{fill}"/>')
        parts.append(
            f'<text x="{x}" y="{y - 8}" font-size="10" text-anchor="middle" fill="{TEXT}">{escape(texts[node])}</text>'
        )
        parts.append(f"<title>node {node}, token {tokens[node]}, depth {depth}</title></g>")
    return "".join([*parts, "</svg>"])


def _open(width: float, height: float, title: str) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="ui-monospace, monospace">'
        f"<title>{escape(title)}</title>"
    )
