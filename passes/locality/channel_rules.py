"""Rules for ops that know of channels, of images or of pairs: convolutions of width 1, group norms, gates, distances.

They are written for images and sounds, where the tokens may stand in the place of a pixel or of a batch entry.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from treespec_compiler.ir.arguments import argument
from treespec_compiler.ir.provenance import op_name

from .axes import Axes, Axis, Mixes, rank_of
from .token_rules import RULES, AxisRule

_SPATIAL = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}


def _only_first(node: fx.Node, axes: Axes) -> int:
    operand: Any = node.args[0]
    at = axes.axes[operand]
    if at is None or any(axes.axes.get(a) is not None for a in node.all_input_nodes if a is not operand):
        raise Mixes("an operand other than the first carries tokens")
    return at


def _convolution(node: fx.Node, axes: Axes) -> Axis:
    """[N, C, spatial..]: each batch entry on its own, and each place where the kernel has width 1."""
    at = _only_first(node, axes)
    spatial = rank_of(node) - _SPATIAL.get(op_name(node), rank_of(node) - 2)
    if at < spatial - 1:
        return at
    if at == spatial - 1:
        raise Mixes("it mixes channels, which are the tokens here")
    place = at - spatial
    width, stride, padding = (
        node.args[1].meta["val"].shape[2 + place],
        _at(argument(node, "stride"), place),
        _at(argument(node, "padding"), place),
    )
    if width != 1:
        raise Mixes(f"it is a convolution of width {width} over the tokens")
    if stride != 1 or padding not in (0, "valid", "same") or argument(node, "transposed", False):
        raise Mixes("it is a convolution that drops or adds tokens")
    return at


def _at(value: Any, place: int) -> Any:
    """One of a list of numbers, or the one for all."""
    if isinstance(value, (list, tuple)):
        return value[place] if len(value) > 1 else value[0]
    return value


def _by_entry(node: fx.Node, axes: Axes) -> Axis:
    """Statistics over everything but the batch."""
    at = _only_first(node, axes)
    if at != 0:
        raise Mixes("it normalises over the tokens")
    return 0


def _prelu(node: fx.Node, axes: Axes) -> Axis:
    at = _only_first(node, axes)
    count = node.args[1].meta["val"].numel()
    if count != 1 and at == min(1, rank_of(node) - 1):
        raise Mixes("its slopes belong to places in the sequence")
    return at


def _pair(node: fx.Node, axes: Axes) -> Axis:
    """Two tensors compared along one dimension, which goes."""
    at = RULES["aten.add"](_Broadcast(node), axes)
    rank = max(rank_of(a) for a in node.args[:2])
    dim = int(argument(node, "dim", -1)) % rank
    if at == dim or at is None:
        raise Mixes(f"it works along dimension {dim}, the tokens")
    return at if argument(node, "keepdim", False) else at - (dim < at)


class _Broadcast:
    """The result of an element-wise op on the node's two operands."""

    def __init__(self, node: fx.Node) -> None:
        self.all_input_nodes = node.all_input_nodes
        a, b = (x.meta["val"] for x in node.args[:2])
        self.meta = {"val": a + b}


def _first(node: fx.Node, axes: Axes) -> Axis:
    return _only_first(node, axes)


def _baddbmm(node: fx.Node, axes: Axes) -> Axis:
    """extra + a b of [batch, rows, columns]."""
    extra, a, b = node.args[:3]
    found = {at for x, at in ((a, axes.axes[a]), (b, axes.axes[b])) if at is not None}
    if axes.axes[a] == 2 or axes.axes[b] == 1:
        raise Mixes("it contracts the token dimension")
    beside = axes.axes.get(extra)
    if beside is not None:
        found.add(beside + 3 - rank_of(extra))
    if len(found) != 1:
        raise Mixes("it combines every token of one operand with every token of the other")
    return found.pop()


_POINTWISE = (
    "__lshift__", "__rshift__", "__xor__", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh",
    "bitwise_left_shift", "bitwise_right_shift", "bitwise_xor", "copysign", "cosh", "deg2rad", "digamma", "erfc",
    "erfinv", "float_power", "fmax", "fmin", "fmod", "frac", "hardshrink", "heaviside", "hypot", "isclose",
    "isfinite", "isneginf", "isposinf", "ldexp", "lgamma", "log10", "logaddexp2", "logical_xor", "logit",
    "positive", "rad2deg", "sgn", "signbit", "sinc", "sinh", "softshrink", "special_entr", "special_erf",
    "special_erfc", "special_expit", "special_xlog1py", "tan", "xlogy",
)  # fmt: skip
_REDUCED = (
    "aminmax", "count_nonzero", "cummax", "cummin", "kthvalue", "median", "mode", "nanmean", "nanmedian",
    "nansum", "std_mean", "var_mean",
)  # fmt: skip
_ALONG = ("cumprod", "diff", "glu", "logcumsumexp")
_KEPT = ("cummax", "cummin")

CHANNELS: dict[str, AxisRule] = (
    {f"aten.{name}": RULES["aten.add"] for name in _POINTWISE}
    | {f"aten.{name}": RULES["aten.cumsum" if name in _KEPT else "aten.amax"] for name in _REDUCED}
    | {f"aten.{name}": RULES["aten.cumsum"] for name in _ALONG}
    | dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"), _convolution)
    | {
        "aten.group_norm": _by_entry,
        "aten.instance_norm": _by_entry,
        "aten.prelu": _prelu,
        "aten._prelu_kernel": RULES["aten.add"],
        "aten.cosine_similarity": _pair,
        "aten.linalg_vecdot": _pair,
        "aten.bucketize": _first,
        "aten.baddbmm": _baddbmm,
    }
)
