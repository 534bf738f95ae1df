"""The page that `treespec coverage` writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .check import NODES, ROUNDS, TOLERANCE, Result
from .foreign import version_of
from .models import CLASS_TEXT

FOREIGN = "## Other packages"
VERDICTS = ("exact", "refused", "wrong", "error")


def page(results: list[Result], missing: Sequence[str] = ()) -> str:
    """Markdown: what was checked, counts by class, the types that were not run, and a table of types for each class."""
    parts = [_head(), _counts(results)]
    if missing:
        parts.append(f"Not run ({len(missing)}): {', '.join(missing)}.")
    for label, text in CLASS_TEXT.items():
        chosen = [r for r in results if r.cls == label]
        if chosen:
            parts.append(f"## Class {label}: {text}\n\n{_table(chosen)}")
    return "\n\n".join(parts) + "\n"


def mesh_page(results: list[Result], missing: Sequence[str], mesh: str) -> str:
    """Markdown: how each type was cut for the ranks of a mesh, or why it was not."""
    made_with = f"transformers {version('transformers')}, torch {version('torch')}"
    command = f"treespec coverage --mesh {mesh} --output docs/coverage-{mesh.replace('=', '')}.md"
    head = f"""# How are the decoders of transformers cut for `{mesh}`?

Written by `{command}` with {made_with}.

Each type is a model of a few small layers with random float32 weights, cut by pass `shard` and run on all ranks in one
process; *exact*: every rank gave the eager model's logits within {TOLERANCE:.0e} of their largest magnitude, after a
prompt and on trees. Products with weights are cut by outputs (column), by inputs (row) or not; *reduces* are
all_reduces of one step, over all attention sites; *gathers* all_gathers, the logits' one among them; *share* is one
rank's part of the weights (the table of embeddings is whole). *tp_plan*: how many names of weights transformers' own
plan cuts in the same way, and where the two differ; empty where it has no plan. *refused*: treespec says why."""
    titles = "type, verdict, column, row, whole, sites cut, reduces, gathers, share, tp_plan, worst error, why not"
    rows = [f"| {titles.replace(', ', ' | ')} |", "|---" * 12 + "|"]
    for r in sorted(results, key=lambda r: (VERDICTS.index(r.verdict), r.type)):
        cut = r.cut or {}
        sites = f"{r.sites - cut['whole_sites']} of {r.sites}" if cut and r.sites is not None else ""
        counts = [cut.get(name, "") for name in ("column", "row", "whole")]
        traffic = [cut.get(name, "") for name in ("all_reduce", "all_gather", "share")]
        error = f"{r.error:.1e}" if r.error is not None else ""
        cells = [r.type, r.verdict, *counts, sites, *traffic, _against(cut), error, _why(r)]
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    parts = [head, _mesh_counts(results), "\n".join(rows)]
    if missing:
        parts.insert(2, f"Not run ({len(missing)}): {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _against(cut: dict[str, Any]) -> str:
    plan = cut.get("plan")
    return "; ".join([f"{plan['agree']} alike", *plan["differ"]]) if plan else ""


def _mesh_counts(results: list[Result]) -> str:
    plans = [r.cut["plan"] for r in results if r.cut and r.cut.get("plan")]
    same = sum(not plan["differ"] for plan in plans)
    count = Counter(r.verdict for r in results)
    whole = sum(bool(r.cut and r.cut["whole_sites"]) for r in results)
    verdicts = ", ".join(f"{count[v]} {v}" for v in VERDICTS if count[v])
    told = f"with a plan of transformers' own: {len(plans)}, alike in {same}"
    return f"{len(results)} types: {verdicts}; with attention that stays whole: {whole}; {told}."


def foreign_section(results: list[Result], missing: Sequence[str]) -> str:
    """Markdown: decoders of other packages than transformers."""
    packages = dict.fromkeys(r.type.split(": ")[0] for r in results)
    made_with = ", ".join(map(version_of, packages))
    left_out = f" Not installed, and left out: {', '.join(missing)}." if missing else ""
    count = Counter(r.verdict for r in results)
    told = ", ".join(f"{count[v]} {v}" for v in VERDICTS if count[v])
    return f"""{FOREIGN}

Written by `treespec coverage --foreign --output docs/coverage.md` with {made_with}.{left_out}
Tiny models with random weights, checked as above: {told}.

{_table(results)}
"""


def section_of(text: str) -> str:
    """The section on other packages in a page; "" where there is none."""
    at = text.find(FOREIGN)
    return text[at:] if at >= 0 else ""


def with_section(text: str, section: str) -> str:
    """The page with this section on other packages."""
    rest = text.removesuffix(section_of(text)).rstrip()
    return (rest + "\n\n" if rest else "") + (section.rstrip() + "\n" if section else "")


def _head() -> str:
    made_with = f"transformers {version('transformers')}, torch {version('torch')}"
    return f"""# Coverage of the decoders of transformers

Written by `treespec coverage --output docs/coverage.md` with {made_with}.

Each type is a model of a few small layers with random float32 weights, default attention and experts settings.
*exact*: each of {ROUNDS} rounds of verify and commit on trees of {NODES} nodes after a committed prefix, and a forest
over three slots with prefixes of different lengths, gave the eager model's logits within {TOLERANCE:.0e} of their
largest magnitude; *packing* is how far the forest was from each slot alone. Of equal scores an indexer takes those that
the model's own decoding takes (docs/hybrids.md), with which a path was compared, too. Types with a window were run with
one shorter and one longer than the traced prompt, and some types with variants of their configuration. *refused*:
treespec says why, nothing was converted. *wrong* must never appear. *error*: the tiny model could not be built or
run, or treespec failed otherwise.

Classes: A plain attention, B eager attention, C mixture of experts, D a variation of mask or score, E a token mixer
other than attention (a state, or refused), F no full graph, N not a decoder alone (to be refused)."""


def _counts(results: list[Result]) -> str:
    rows = ["| class | types | " + " | ".join(VERDICTS) + " |", "|---" * (2 + len(VERDICTS)) + "|"]
    for label in [*CLASS_TEXT, "all"]:
        chosen = [r for r in results if label in (r.cls, "all")]
        if chosen:
            count = Counter(r.verdict for r in chosen)
            rows.append(f"| {label} | {len(chosen)} | " + " | ".join(str(count[v]) for v in VERDICTS) + " |")
    return "\n".join(rows)


def _table(results: list[Result]) -> str:
    rows = ["| type | verdict | worst error | packing | sites | masks | why not |", "|---|---|---|---|---|---|---|"]
    for r in sorted(results, key=lambda r: (VERDICTS.index(r.verdict), r.type)):
        error = f"{r.error:.1e}" if r.error is not None else ""
        packing = f"{r.packing:.1e}" if r.packing is not None else ""
        cells = [r.type, r.verdict, error, packing, str(r.sites or ""), "; ".join(f"`{m}`" for m in r.masks), _why(r)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _why(result: Result) -> str:
    if result.verdict == "exact" or not result.reason:
        return ""
    parts = [_shorten(result.reason)]
    if result.variant not in (None, "default"):
        parts.append(f"({result.variant})")
    if result.source:
        parts.append(f"at `{_place(result.source)}`")
    if result.layer:
        parts.append(f"in `{result.layer}`" + (f" ({result.module})" if result.module else ""))
    return " ".join(parts)


def _place(source: str) -> str:
    """`file.py:line` of a full source line."""
    found = re.match(r"(?:.*/)?([^/]+:\d+)", source.split(", in ")[0])
    return found[1] if found else source


def _shorten(text: str, limit: int = 240) -> str:
    text = " ".join(text.split()).replace("<", "&lt;")
    return text if len(text) <= limit else text[: limit - 3] + "..."
