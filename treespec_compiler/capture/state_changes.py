"""What a forward pass changes besides giving logits: buffers that may be K/V caches, and what is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..errors import Refusal, Unsupported
from .weight_ref import WeightRef


def put_logits_first(gm: fx.GraphModule, written: Sequence[str], weights: Mapping[str, WeightRef]) -> None:
    """Logits become output 0, the new contents of the `written` inputs outputs 1, 2, ... (they come first in `gm`).

    `strip native cache` proves that these buffers are K/V caches, or refuses; anything else that is kept is refused
    here.
    """
    foreign = [weights[n].name if n in weights else n for n in written if _nobodys(n, weights)]
    if foreign:
        raise Unsupported(
            Refusal.STATE,
            f"the forward pass changes state in place: {', '.join(foreign)}",
            way_out="call it without its own cache (use_cache=False), or move the update out of forward",
        )
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    values = list(output.args[0])
    updates, logits, attributes = values[: len(written)], values[len(written)], values[len(written) + 1 :]
    kept = sum(not (_is_constant(value) or _is_held(value, weights)) for value in attributes)
    if kept:
        raise Unsupported(
            Refusal.STATE,
            f"the forward pass keeps {kept} value(s) besides the logits (it sets attributes)",
            way_out="move the assignment out of forward, or call it without its own cache (use_cache=False)",
        )
    output.args = ((logits, *updates),)


def _is_held(value: fx.Node, weights: Mapping[str, WeightRef]) -> bool:
    """Whether the value is a tensor that the model holds already, as `self.table = self.table.to(x.device)` gives.

    Setting it changes no later call, unless another one was there; a second call is compared here, too.
    """
    return value.op == "placeholder" and value.name in weights and not _nobodys(value.name, weights)


def _is_constant(value: fx.Node) -> bool:
    """Whether the value is made of nothing that the model holds or is given: a table computed when first needed.

    Setting it as an attribute then changes no later call, unless the model does something else once it is set; so a
    second call is compared (`semantics.lengths_check`).
    """
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        stack.extend(n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return True


def _nobodys(name: str, weights: Mapping[str, WeightRef]) -> bool:
    """Whether no module holds the tensor, so that nobody could keep the user's own copy from being written."""
    return name not in weights or weights[name].owner is None
