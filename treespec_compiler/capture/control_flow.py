"""What keeps a graph from being the same for every length: scans, loops, conditions, sizes taken as constants."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..errors import Refusal, Unsupported
from ..ir.provenance import layer_path, module_class, source_line

_SCAN = "carries a state from step to step"
_BRANCH = "chooses at run time what to compute"
_MAP = "maps a function over a dimension (torch.vmap, as in an associative scan)"

_KINDS = {_SCAN: Refusal.MIXER, _MAP: Refusal.MIXER, _BRANCH: Refusal.CONTROL}
_REASONS = {
    "associative_scan": _SCAN,
    "scan": _SCAN,
    "while_loop": _BRANCH,
    "cond": _BRANCH,
    "map": _BRANCH,
    "map_impl": _BRANCH,
    "_add_batch_dim": _MAP,
    "_remove_batch_dim": _MAP,
}


def refuse_control_flow(gm: fx.GraphModule) -> None:
    """Raise `Unsupported` for the first operator that runs a subgraph step by step or on a condition."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = str(getattr(node.target, "__name__", node.target))
            if node.op == "call_function" and name == "_enter_autocast":
                _refuse_autocast(node)
            if node.op == "call_function" and name in _REASONS:
                raise Unsupported(
                    _KINDS[_REASONS[name]],
                    f"{name} {_REASONS[name]}",
                    node=f"{node.name} = {name}",
                    source=source_line(node),
                    layer=layer_path(node),
                    module=module_class(node),
                    way_out=None if _REASONS[name] is _BRANCH else "only attention may carry anything between tokens",
                )


def _refuse_autocast(node: fx.Node) -> None:
    """A region that is switched on computes in another type than the graph, which knows of no regions, would."""
    kind, dtype, enabled, *_ = (*node.args, None, None, True)[:3]
    if enabled:
        raise Unsupported(
            Refusal.ROUNDING,
            f"forward computes a part under torch.autocast({kind!r}, {dtype}): how it rounds there is not in the graph",
            node=f"{node.name} = torch.autocast",
            source=source_line(node),
            layer=layer_path(node),
            module=module_class(node),
            way_out="convert that part's weights and inputs to the type, or call the model without autocast",
        )


def where_specialised(mode: Any) -> str | None:
    """The user's line that made a size a constant, as the trace's shape environment remembers it."""
    places = getattr(getattr(mode, "shape_env", None), "replacements_slocs", None) or {}
    found = [str(place.maybe_user_loc) for place in places.values() if getattr(place, "maybe_user_loc", None)]
    return found[0] if found else None
