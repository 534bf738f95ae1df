"""What torch's own errors of a trace mean: the one place that reads them, by their types and attributes."""

from __future__ import annotations

from collections.abc import Iterator

from torch._dynamo.exc import ObservedException, TorchDynamoException, TorchRuntimeError
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from ..errors import Refusal, Unsupported

TRACE_ERRORS = (ConstraintViolationError, GuardOnDataDependentSymNode, TorchDynamoException)

_BY_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
_RAISED = (ObservedException, TorchRuntimeError)
# Dynamo's names of graph breaks (`Unsupported.gb_type`, torch/_dynamo/graph_break_registry.json).
_BREAKS = {
    "Data-dependent branching": Refusal.CONTROL,
    "Data-dependent branching with non-constant __bool__": Refusal.CONTROL,
    "Data-dependent assertion failed (cannot compile partial graph)": Refusal.CONTROL,
    "Data dependent operator": Refusal.CONTROL,
    "Dynamic shape operator": Refusal.CONTROL,
    "Observed exception": Refusal.RAISES,
    "Assertion failed on symbolic shapes": Refusal.RAISES,
}


def kind_of(error: BaseException) -> Refusal:
    """The kind of refusal that an error of Dynamo is."""
    if isinstance(error, ConstraintViolationError):
        return Refusal.SPECIALISED
    named = _BREAKS.get(getattr(error, "gb_type", ""))
    if named is not None:
        return named
    causes = list(_causes(error))
    if any(isinstance(cause, _BY_VALUES) for cause in causes):
        return Refusal.CONTROL
    if any(isinstance(cause, _RAISED) for cause in causes):
        return Refusal.RAISES
    return Refusal.NO_GRAPH


def own_refusal(error: BaseException) -> Unsupported | None:
    """The refusal of ours that Dynamo wrapped, if it is one."""
    return next((cause for cause in _causes(error) if isinstance(cause, Unsupported)), None)


def lacks_compiler(error: BaseException) -> bool:
    """Whether Inductor failed for want of a C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    return any(isinstance(cause, InvalidCxxCompiler) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or during."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
