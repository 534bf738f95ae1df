"""What of a graph is shown: layers of equal structure once, or the nodes of one attention site's module."""

from __future__ import annotations

from dataclasses import dataclass

from treespec_compiler.errors import InvalidOption

from .layers import Section, layer_numbers, sections
from .snapshot import Snapshot


@dataclass(frozen=True)
class View:
    """What of a graph is shown: which layer stands for those like it, only one site's module, or every node."""

    layer: int | None = None
    site: str | None = None
    fold: bool = True


def shown(graph: Snapshot, view: View) -> list[tuple[Section | None, str]]:
    """What the view shows: (section or None when it is folded away, comment before it)."""
    parts = sections(graph)
    if view.site is not None:
        return _site_only(parts, view.site)
    if view.layer is not None and view.layer not in layer_numbers(parts):
        known = layer_numbers(parts)
        expected = f"0 to {known[-1]}" if known else "none: this graph has no numbered layers"
        raise InvalidOption(name="--layer", got=view.layer, expected=expected)
    standing: dict[int, Section] = {}
    for part in parts:
        if part.group and (part.shape not in standing or part.index == view.layer):
            standing[part.shape] = part
    alike: dict[int, list[Section]] = {}
    for part in parts:
        if part.group:
            alike.setdefault(part.shape, []).append(part)
    result: list[tuple[Section | None, str]] = []
    folded: list[Section] = []

    def flush() -> None:
        if folded:
            first, last = folded[0], folded[-1]
            span = first.group if first is last else f"{first.group} to {last.group}"
            count = sum(len(p.nodes) for p in folded)
            result.append((None, f"{span}: {count} nodes, structure of {standing[first.shape].group}, folded"))
            folded.clear()

    for part in parts:
        if not part.group:
            flush()
            result.append((part, "outside the layers" if result else ""))
        elif view.fold and standing[part.shape] is not part:
            if folded and folded[-1].shape != part.shape:
                flush()
            folded.append(part)
        else:
            flush()
            others = len(alike[part.shape]) - 1
            same = f", {others} more of this structure" if others and view.fold else ""
            result.append((part, f"{part.group}: {len(part.nodes)} nodes{same}"))
    flush()
    return result


def _site_only(parts: list[Section], site: str) -> list[tuple[Section | None, str]]:
    wanted = site.split("#")[0]
    if site.lstrip("#").isdecimal():
        wanted = next((n.layer for p in parts for n in p.nodes if n.site == int(site.lstrip("#"))), site)
    result: list[tuple[Section | None, str]] = []
    hidden = 0
    for part in parts:
        nodes = tuple(n for n in part.nodes if n.layer == wanted or n.layer.startswith(wanted + "."))
        hidden += len(part.nodes) - len(nodes)
        if nodes:
            result.append((Section(part.group, part.index, nodes, part.shape), f"{wanted}: {len(nodes)} nodes"))
    if not result:
        known = sorted({n.layer for p in parts for n in p.nodes if n.site is not None})
        expected = ", ".join(known) if known else "a module path of the graph"
        raise InvalidOption(name="--site", got=site, expected=expected, fix="`treespec explain` names the sites.")
    return [*result, (None, f"{hidden} nodes of other modules are not shown")]
