"""A refusal: what cannot be converted, of which kind, and where in the model it is."""

from __future__ import annotations

import enum
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from .base import TreespecError


class Refusal(enum.StrEnum):
    """What kind of thing is in the way of a conversion. Decisions read the kind, never the words of a reason."""

    NO_GRAPH = "no-graph"  # the code cannot be traced as one graph
    CONTROL = "control-flow"  # what is computed is chosen at run time, by values
    RAISES = "raises"  # the model's own code raises for this number of tokens
    SPECIALISED = "specialised"  # the number of tokens is a constant of the trace
    BRANCH = "branch"  # other numbers of tokens are computed in another way
    LENGTH = "length"  # the number of tokens is used as a number
    POSITIONS = "positions"  # positions that do not count the tokens one by one
    MASK = "mask"  # a mask that is not causal, or whose predicate is not known
    CONTENT = "content"  # a mask that is computed from the content of the tokens
    ATTENTION = "attention"  # attention in a form that is not known
    NO_ATTENTION = "no-attention"  # there is nothing to keep a tree of
    MIXER = "mixer"  # information moves between tokens outside attention
    UNKNOWN_OP = "unknown-op"  # an op without a rule: it may mix tokens
    STATE = "state"  # forward changes or keeps something, or reads its own cache elsewhere
    ROUNDING = "rounding"  # numbers are rounded where the program would not, or not in the same way
    TRAINING = "training"  # dropout or random numbers
    SUBCLASS = "subclass"  # parameters that are not plain tensors
    CALL = "call"  # what the model takes or gives back is not token ids and logits
    EARLY_EXIT = "early-exit"  # the graph has no place to leave at
    MESH = "mesh"  # nothing can be cut for so many ranks
    RESIDUAL = "residual"  # no single value carries everything from one layer to the next


@dataclass(eq=False)
class Unsupported(TreespecError):
    """A refusal: the graph was not converted. Never raised after something was half converted."""

    kind: Refusal
    reason: str
    _: KW_ONLY
    node: str | None = None
    """The graph node that stopped the conversion, printed."""
    source: str | None = None
    """`file:line` (and the line's text) of the model's code that made the node."""
    layer: str | None = None
    """Path of the submodule, `model.layers.3.self_attn`."""
    module: str | None = None
    """Class of that submodule, or of the nearest one around it that is not one of torch's."""
    way_out: str | None = None
    verdict: str = "treespec cannot convert this model"

    DEFAULT_WAY_OUT: ClassVar[str] = (
        'run the model without speculation (`on_unsupported="fallback"`), or change the code at the line above'
    )

    def __str__(self) -> str:
        rows = [
            ("node", self.node),
            ("source", self.source),
            ("layer", self.place),
            ("reason", self.reason),
            ("way out", self.way_out or self.DEFAULT_WAY_OUT),
        ]
        lines = [f"  {name + ':':<8} {_indent(str(value))}" for name, value in rows if value]
        return "\n".join([f"{self.verdict}.", *lines])

    @property
    def place(self) -> str | None:
        """`model.layers.3.self_attn (LlamaAttention)`."""
        return f"{self.layer} ({self.module})" if self.layer and self.module else self.layer


def _indent(text: str) -> str:
    return "\n           ".join(text.strip().splitlines())
