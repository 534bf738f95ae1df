"""Ops that a user vouches for: their effect on tokens cannot be read off a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from treespec_compiler.errors import InvalidOption
from treespec_compiler.ir.private_torch import OpOverloadPacket

from .axes import Axes, Axis, Mixes
from .channel_rules import CHANNELS
from .token_rules import RULES, AxisRule
from .token_writes import WRITES

TokenRule = Callable[[Sequence[int | None]], int]
"""Token dimension of each positional argument (None: none) -> that of the result; ValueError(why) refuses."""

_CUSTOM: dict[str, AxisRule] = {}


def register_op(op: Any, token_local: bool | TokenRule = True) -> None:
    """Vouch for a custom op: row i of its result depends on row i of its token-carrying arguments only.

    `op`: a `torch.library.custom_op`, `torch.ops.namespace.name` (or an overload of it), or "namespace::name".
    `token_local`: True, the result carries the tokens where the first tensor argument does; a function from the token
    dimensions of the positional arguments (None where there is none) to that of the result, which may raise ValueError
    to refuse; False takes the word back. treespec cannot check it beyond shapes: a wrong word gives wrong logits.
    Ops with a rule of their own, such as ATen's, cannot be given another.
    """
    name = _packet_name(op)
    if name in RULES or name in WRITES or name in CHANNELS:
        fix = "Leave it out: its own rule decides."
        raise InvalidOption(name="op", got=name, expected="an op that treespec has no rule for", fix=fix)
    if token_local is False:
        _CUSTOM.pop(name, None)
    elif token_local is True:
        _CUSTOM[name] = _like_first
    elif callable(token_local):
        _CUSTOM[name] = _by_rule(token_local)
    else:
        raise InvalidOption(name="token_local", got=token_local, expected="True, False or a rule function")


def custom_rule(name: str) -> AxisRule | None:
    """The rule of an op that was vouched for."""
    return _CUSTOM.get(name)


def _packet_name(op: Any) -> str:
    """`namespace.name`, as `op_name` prints it."""
    op = getattr(op, "_opoverload", op)  # torch.library.custom_op
    if isinstance(op, str) and op.count("::") == 1 and all(op.split("::")):
        return op.replace("::", ".").removesuffix(".default")
    packet = getattr(op, "overloadpacket", op)
    if isinstance(packet, OpOverloadPacket):
        return str(packet)
    fix = "Register the function with torch.library.custom_op first."
    expected = "a custom op, torch.ops.namespace.name or 'namespace::name'"
    raise InvalidOption(name="op", got=op, expected=expected, fix=fix)


def _like_first(node: fx.Node, axes: Axes) -> Axis:
    first = next((a for a in node.args if isinstance(a, fx.Node) and a in axes.axes), None)
    if first is None or axes.axes[first] is None:
        raise Mixes("it is registered as token_local=True, but its first tensor argument carries no tokens")
    return axes.axes[first]


def _by_rule(rule: TokenRule) -> AxisRule:
    def apply(node: fx.Node, axes: Axes) -> Axis:
        dims = [axes.axes.get(a) if isinstance(a, fx.Node) else None for a in node.args]
        try:
            return rule(dims)
        except ValueError as error:
            raise Mixes(str(error)) from error

    return apply
