"""Who implements which op: `treespec::X` in a graph is bound to the best kernel that takes the call.

Kernels are entered by `register_kernel`, or found under the entry point group `treespec.kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import InvalidKernel
from ..logs import logger
from . import library
from .private_torch import OpOverload

log = logger(__name__)

GROUP = "treespec.kernels"
USERS_NAMESPACE = "treespec_kernels"

Arguments = Mapping[str, Any]
"""Of a call, by name: tensors as fake ones, what is left out as the schema's default."""


@dataclass(frozen=True)
class Kernel:
    """An implementation of `op` with the same schema, under the name `target`."""

    op: OpOverload
    target: OpOverload
    name: str
    device: str
    """A device type, or "any"."""
    dtypes: frozenset[torch.dtype] | None
    """Of the result; None: any floating-point dtype."""
    priority: int
    available: Callable[[], bool]
    """May be slow the first time (a build); asked only of kernels that take the call."""
    capturable: bool = False
    """Never waits for the device, so a CUDA graph may hold it."""
    optional: frozenset[str] | None = None
    """Which of the op's optional arguments it can be given; None: all of them."""
    condition: Callable[[Arguments], bool] | None = None
    """What else must be so: head sizes, say."""

    def runs(self, device: str, dtype: torch.dtype, given: Collection[str] = ()) -> bool:
        """Whether it is for this device and dtype, and can be `given` these optional arguments."""
        suits = self.device in (device, "any") and (self.dtypes is None or dtype in self.dtypes)
        return suits and (self.optional is None or self.optional.issuperset(given))

    def takes(self, node: fx.Node) -> bool:
        """Whether it can run this call of `op`, from fake values alone; whether it is there, `available` says."""
        result, values = _result(node), library.arguments(node)
        return self.runs(result.device.type, result.dtype, library.given(self.op, values)) and (
            self.condition is None or self.condition(fx.node.map_arg(values, lambda n: n.meta["val"]))
        )


_KERNELS: dict[OpOverload, list[Kernel]] = {}


def register_kernel(
    op: OpOverload | str,
    target: OpOverload | Callable[..., Any],
    *,
    name: str,
    device: str = "any",
    dtypes: Collection[torch.dtype] | None = None,
    optional: Collection[str] | None = None,
    condition: Callable[[Arguments], bool] | None = None,
    priority: int = 50,
    available: Callable[[], bool] = lambda: True,
    capturable: bool = False,
) -> Kernel:
    """Enter a kernel for an op of the tree IR; one of the same name for the same op is replaced.

    `op`: such an op, or its name, as "tree_attention". `target`: a function of the op's arguments, or an op with its
    schema. `device`: a device type, as "cuda". `dtypes`: of the result; None: any floating-point dtype. `optional`:
    which optional arguments it takes, by name; None: all. `condition`: more that must hold, of the arguments by name
    (tensors as fake ones, so shapes and dtypes). The available kernel of highest `priority` that takes a call runs it;
    treespec's own have 10 to 30. `capturable`: whether a CUDA graph may hold it.

    Raises InvalidKernel for an op, or an optional argument, that there is not.
    """
    found = _op(op)
    unknown = sorted(set(optional or ()) - set(library.optional(found)))
    if unknown:
        names = ", ".join(library.optional(found)) or "none"
        raise InvalidKernel(name=name, got=f"the optional arguments {', '.join(unknown)}", expected=f"some of {names}")
    if isinstance(target, OpOverload):
        target = library.means(target, found)
    else:
        target = _implement(found, target, name)
    kernel = Kernel(
        found,
        target,
        name,
        device,
        None if dtypes is None else frozenset(dtypes),
        priority,
        available,
        capturable,
        None if optional is None else frozenset(optional),
        condition,
    )
    others = [k for k in _KERNELS.get(found, []) if k.name != name]
    _KERNELS[found] = sorted([*others, kernel], key=lambda k: -k.priority)
    return kernel


def _op(op: OpOverload | str) -> OpOverload:
    from . import ops  # noqa: F401  (defines them all)

    every = library.defined()
    found = every.get(op.removeprefix(f"{library.NAMESPACE}::")) if isinstance(op, str) else op
    if found is None or library.definition(found) is not found:
        expected = f"an op of the tree IR: {', '.join(sorted(every))}"
        raise InvalidKernel(name=str(op), got=f"the op {op}", expected=expected)
    return found


_made: dict[tuple[OpOverload, str], int] = {}


def _implement(op: OpOverload, run: Callable[..., Any], name: str) -> OpOverload:
    """NOTE a name of an op cannot be given twice: a kernel that is entered again gets a number."""
    count = _made[op, name] = _made.get((op, name), 0) + 1
    base = f"{library.identifier(name)}_{op._schema.name.partition('::')[2]}"
    return library.implement(op, USERS_NAMESPACE, run, base if count == 1 else f"{base}_{count}")


def unregister_kernel(op: OpOverload, name: str) -> None:
    """Forget a kernel; nothing happens if there is none of that name. Graphs it is bound in go on calling it."""
    _KERNELS[op] = [k for k in _KERNELS.get(op, []) if k.name != name]


def kernels(op: OpOverload) -> tuple[Kernel, ...]:
    """Every kernel entered for `op`, best first, available or not; those of installed packages included."""
    _load_installed()
    return tuple(_KERNELS.get(op, ()))


@functools.cache
def _load_installed() -> None:
    """An entry point names a module that enters its kernels, or a function without arguments that does."""
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            if callable(found):
                found()
        except Exception as error:
            log.warning("entry point %s (%s) gives no kernel: %s", point.name, point.value, error)


def best_kernel(
    op: OpOverload,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    given: Collection[str] = (),
    portable: bool = False,
) -> Kernel | None:
    """The available kernel of highest priority; None: only the reference, which is `op` itself.

    `given`: the optional arguments it must take. `portable`: among those for any device.
    """
    kind = torch.device(device).type
    return _first(k for k in kernels(op) if k.runs(kind, dtype, given) and (k.device == "any" or not portable))


def best_kernel_for(node: fx.Node, *, portable: bool = False) -> Kernel | None:
    """The same for a call in a graph, whose target is an op of the tree IR."""
    assert isinstance(node.target, OpOverload)
    return _first(k for k in kernels(node.target) if k.takes(node) and (k.device == "any" or not portable))


def _first(found: Any) -> Kernel | None:
    return next((k for k in found if k.available()), None)


def _result(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def kernel_of(target: OpOverload) -> Kernel | None:
    """The kernel that was entered under this name."""
    return next((k for entered in _KERNELS.values() for k in entered if k.target is target), None)
