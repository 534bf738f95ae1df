"""What the disk, the cores and the drafts did when: noted while somebody looks, and drawn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

What = Literal["read", "wait", "verify", "draft"]
LANES: tuple[tuple[str, tuple[What, ...]], ...] = (
    ("disk", ("read",)),
    ("cores", ("verify", "wait")),
    ("draft", ("draft",)),
)
COLOURS: dict[What, str] = {"read": "#3b82f6", "verify": "#16a34a", "wait": "#f59e0b", "draft": "#a855f7"}
MEANINGS: dict[What, str] = {
    "read": "a layer is read (its number)",
    "verify": "the target computes",
    "wait": "the cores wait for a layer",
    "draft": "drafts guess",
}
LEFT, WIDTH, HIGH, GAP, TOP = 60, 900, 22, 12, 30  # pixels


@dataclass(frozen=True)
class Span:
    """Seconds of `time.perf_counter`; `label`: the layer of the model, where it is about one."""

    what: What
    began: float
    ended: float
    label: str = ""


_LOOKING: list[list[Span]] = []


@contextlib.contextmanager
def noted() -> Iterator[list[Span]]:
    """What every ring of this process does meanwhile, in the order in which it ended."""
    spans: list[Span] = []
    _LOOKING.append(spans)
    try:
        yield spans
    finally:
        _LOOKING[:] = [each for each in _LOOKING if each is not spans]


def note(what: What, began: float, label: str = "") -> None:
    """That it ends now."""
    if _LOOKING:
        span = Span(what, began, time.perf_counter(), label)
        for spans in _LOOKING:
            spans.append(span)


def timeline_svg(spans: Sequence[Span], began: float, ended: float) -> str:
    """What was done between two moments: a lane for the disk, one for the cores, one for drafts.

    Reads that overlap stand in two rows, by turns.
    """
    scale = WIDTH / max(ended - began, 1e-9)
    height = TOP + len(LANES) * (HIGH + GAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" role="img" '
        f'font-family="ui-monospace, monospace" font-size="10"><title>What a step with streamed weights does</title>'
    ]
    for lane, (name, kinds) in enumerate(LANES):
        top = TOP + lane * (HIGH + GAP)
        parts.append(f'<text x="4" y="{top + 15}" fill="#888">{name}</text>')
        seen = sorted((s for s in spans if s.what in kinds), key=lambda s: (kinds.index(s.what), s.began))
        for number, span in enumerate(seen):
            first, last = max(span.began, began), min(span.ended, ended)
            if last > first:
                parts += _bar(span, LEFT + (first - began) * scale, (last - first) * scale, top, number)
    bottom = TOP + len(LANES) * (HIGH + GAP)
    for tick in range(6):
        x = LEFT + WIDTH * tick / 5
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom - 6}" stroke="#8884"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 12}" fill="#888">{1000 * (ended - began) * tick / 5:.0f} ms</text>')
    for number, (what, meaning) in enumerate(MEANINGS.items()):
        x = LEFT + number * WIDTH / 4
        parts.append(f'<rect x="{x:.1f}" y="{bottom + 8}" width="10" height="10" fill="{COLOURS[what]}"/>')
        parts.append(f'<text x="{x + 14:.1f}" y="{bottom + 17}" fill="#888">{meaning}</text>')
    return "".join([*parts, "</svg>"])


def _bar(span: Span, x: float, wide: float, top: int, number: int) -> list[str]:
    high = HIGH // 2 if span.what == "read" else HIGH
    y = top + (HIGH // 2) * (number % 2) if span.what == "read" else top
    shape = (
        f'<rect x="{x:.1f}" y="{y}" width="{max(wide - 0.5, 0.5):.1f}" height="{high}" fill="{COLOURS[span.what]}"/>'
    )
    if not span.label or span.what != "read" or wide < 14:
        return [shape]
    return [shape, f'<text x="{x + 2:.1f}" y="{y + 9}" font-size="8" fill="#fff">{escape(span.label)}</text>']
