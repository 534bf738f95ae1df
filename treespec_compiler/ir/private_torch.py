"""Names of torch's private modules that rooms besides `capture` and `program` need (docs/torch-api.md)."""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch._logging._internal import trace_structured
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "enable_python_dispatcher",
    "trace_structured",
]
