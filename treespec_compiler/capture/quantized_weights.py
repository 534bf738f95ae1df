"""Weights that torchao quantized: tensor subclasses of integers and scales, read as expressions of these.

A trace sees plain tensors in their places, of which it knows the shapes; what a product multiplies with is
`Dequantized`, of tensors that are watched one by one. Only subclasses that round nothing but weights are read so: the
module then computes, in its own order, the product with `dequantize()`.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refusal, Unsupported
from ..ir.stored_weights import Dequantized
from ..ir.weights import Expression, Source
from .weight_ref import WeightRef, getter

_LIBRARY = "torchao"
_KNOWN = {
    "Int8Tensor": ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
    "IntxUnpackedToInt8Tensor": ("activation_quantization",),
}
"""Subclasses by name, and what is None of them where the other factor of a product stays as it is. All have `qdata`
(integers, of the weight's shape), `scale` and `zero_point` (a number for each block, or None)."""
_PARTS = ("qdata", "scale", "zero_point")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def refuse_subclasses(model: nn.Module) -> None:
    """Capture sees plain tensors only; a subclass that is not known would be opened up into something else."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtypes = {t.dtype for _, t in tensors if type(t) in _PLAIN and t.is_floating_point()}
    for name, tensor in tensors:
        reason = None if type(tensor) in _PLAIN else _obstacle(tensor)
        if reason is None and tensor.is_floating_point() and dtypes and tensor.dtype not in dtypes:
            reason = f"which stands for {tensor.dtype}, in a model of {', '.join(sorted(map(str, dtypes)))}"
        if reason is not None:
            raise Unsupported(
                Refusal.SUBCLASS,
                f"{name} is a {type(tensor).__name__}, {reason}",
                node=name,
                way_out="convert the model before it is quantized or distributed, or quantize nothing but weights, to "
                "integers (torchao's Int8WeightOnlyConfig, IntxWeightOnlyConfig)",
            )


def _obstacle(tensor: Tensor) -> str | None:
    """Why a subclass is not read; None: it is."""
    if type(tensor) not in _classes():
        theirs = type(tensor).__module__.partition(".")[0] == _LIBRARY
        return (
            "whose products are more than those with integers times scales"
            if theirs
            else "a tensor subclass: capture reads plain tensors only"
        )
    active = next((n for n in _KNOWN[type(tensor).__name__] if getattr(tensor, n, None) is not None), None)
    if active is not None:
        return f"with {active}: what it is multiplied with is changed as well while the model runs"
    zeros = _attribute(tensor, "zero_point")
    if _without_zeros(tensor) and zeros is not None and bool(zeros.any()):
        return "whose zero points its own product leaves out"
    return None


def _without_zeros(tensor: Tensor) -> bool:
    """Whether torchao multiplies with a row's integers, and with its scale then."""
    return type(tensor).__name__ == "Int8Tensor" and _attribute(tensor, "scale").shape[-1:] == (1,)


def _classes() -> set[type]:
    library = sys.modules.get(f"{_LIBRARY}.quantization")
    return {getattr(library, name) for name in _KNOWN if hasattr(library, name)} if library is not None else set()


def _attribute(tensor: Any, name: str) -> Any:
    return getattr(tensor, name)


def _held(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """Every place of a quantized weight: the module, its table, the key."""
    classes = _classes()
    if not classes:
        return
    for module in model.modules():
        tables: tuple[Any, ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            yield from ((module, table, key, value) for key, value in table.items() if type(value) in classes)


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Within it plain tensors, of no values, are where the module holds quantized weights. It is not run meanwhile."""
    held = [*_held(model)]
    known: dict[int, Tensor] = {}  # one that is held in several places stays one
    try:
        for module, table, key, value in held:
            if id(value) not in known:
                known[id(value)] = _stand_in(module, key, value)
            table[key] = known[id(value)]
        yield
    finally:
        for _, table, key, value in held:
            table[key] = value


_STAND_INS: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def _stand_in(module: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """The same one each time: guards know it. NOTE by its place, since a tensor that something refers to weakly cannot
    be swapped, which `Module.to` does.
    """
    made = _STAND_INS.setdefault(module, {})
    found = made.get(key)
    if found is None or _laid_out(found) != _laid_out(tensor):
        # Nobody writes to it, so that it takes no memory but addresses.
        found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        found = nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
        made[key] = found
    return found


def _laid_out(tensor: Tensor) -> tuple[Any, ...]:
    return isinstance(tensor, nn.Parameter), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def as_expression(ref: WeightRef) -> tuple[Expression, list[WeightRef]]:
    """What a captured weight is, and the tensors that it is made of. A plain one is itself."""
    outer: Any = getter(ref.owner)(ref.key) if ref.owner is not None else None
    if type(outer) not in _classes():
        return Source.of(ref.name, ref.tensor), [ref]
    names = [name for name in _PARTS if getattr(outer, name, None) is not None]
    if _without_zeros(outer):
        names = [name for name in names if name != "zero_point"]
    refs = {name: _inner(ref, outer, name) for name in names}
    parts = {name: Source.of(inner.name, inner.tensor) for name, inner in refs.items()}
    made = Dequantized(parts["qdata"], parts["scale"], parts.get("zero_point"), outer.dtype)
    return made, [*refs.values()]


def _inner(ref: WeightRef, outer: Tensor, name: str) -> WeightRef:
    return WeightRef(
        f"{ref.name}.{name}", _attribute(outer, name), vars(outer), name, within=(ref.owner, ref.key, outer)
    )


def own_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those tensors, with the ones inside of quantized weights in their places."""
    classes = _classes()
    opened_up = ([t] if type(t) not in classes else [getattr(t, name, None) for name in _PARTS] for t in tensors)
    return [t for parts in opened_up for t in parts if t is not None]
