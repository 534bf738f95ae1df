"""A tree program as a line of text, and as a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import nn

from ..ir.specs import AttentionSpec, StateSpec
from .cuda_graphs import GraphStats


def as_text(
    model: nn.Module | None,
    sites: Sequence[AttentionSpec],
    states: Sequence[StateSpec],
    max_context: int | None,
    stats: GraphStats,
) -> str:
    name = type(model).__name__ if model is not None else "a deleted module"
    masks = ", ".join(sorted({s.mask.formula for s in sites}))
    graphs = "" if stats.off else f", {stats}"
    context = max_context or "unlimited"
    kinds = " and ".join(dict.fromkeys(s.kind for s in states))
    kept = f", {len(states)} states ({kinds})" if states else ""
    seen = f", mask {masks}" if sites else ""
    return f"TreeProgram({name}: {len(sites)} attention sites{seen}{kept}, context {context}{graphs})"


def as_html(text: str, sites: Sequence[AttentionSpec]) -> str:
    """The sites as a table below the text."""
    rows = "".join(
        f"<tr><td>{s.index}</td><td>{escape(s.layer or s.name)}</td><td>{s.heads}/{s.kv_heads}</td>"
        f"<td>{s.key_dim}/{s.value_dim}</td><td><code>{escape(s.mask.formula)}</code></td></tr>"
        for s in sites
    )
    head = "<tr><th>#</th><th>module</th><th>heads/KV</th><th>dims</th><th>mask</th></tr>"
    return f"<p>{escape(text)}</p><table>{head}{rows}</table>"
