"""What a capture read besides tensors, so that a later change of it is noticed.

Dynamo guards what its trace read: attributes, configurations, globals, closures, the code of functions, hooks, children
of modules, training flags, `requires_grad`. Its guards are kept here and asked again, and `unguarded` knows what they
leave out.

As `capture`, this file touches private API of torch; `capture.TESTED_TORCH` is the range it was run on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .alone import alone
from .call import CallSpec, vocabularies
from .code import code_digest, inner_code, names_in
from .fills import refillable, unfilled
from .quantized_weights import opened
from .rewriting import Rewritten, rewritten
from .scripted import has_scripts, scripts_as_python
from .surroundings import outside_autocast, plain_layers
from .unguarded import Unguarded


class Followable(Protocol):
    """What a program was made of besides tensors."""

    def changed(self, model: nn.Module, call: CallSpec) -> str | None:
        """What is another now, in words for a log; None: nothing that was read."""


@dataclass(frozen=True)
class Traced:
    """What code a trace went through, so that another process can look for the same."""

    code: frozenset[CodeType]
    variables: frozenset[str] | None
    """Of the environment, that it may have read; None: any."""
    obstacle: str | None
    """Why another process cannot know by its code what the trace read; None: it can."""

    @classmethod
    def of(cls, parts: Iterable[Traced]) -> Traced:
        """Of several traces: of other lengths, say."""
        parts = list(parts)
        known = [p.variables for p in parts if p.variables is not None]
        variables = frozenset().union(*known) if len(known) == len(parts) else None
        code = frozenset[CodeType]().union(*(p.code for p in parts))
        return cls(code, variables, next((p.obstacle for p in parts if p.obstacle), None))

    @property
    def digests(self) -> frozenset[str]:
        """Of the code, that of functions in it included."""
        return frozenset(code_digest(inner) for code in self.code for inner in inner_code(code))

    @property
    def names(self) -> frozenset[str]:
        """What the code may look up by name."""
        return frozenset(name for code in self.code for inner in inner_code(code) for name in names_in(inner))


class Reads:
    """The state of Python that the traced call of a module depended on. Holds no module and no tensor."""

    def __init__(
        self,
        model: nn.Module,
        traced: FunctionType,
        unheld: Mapping[str, Tensor],
        removed: Sequence[Rewritten] = (),
        code: Sequence[CodeType] = (),
        filled: Sequence[Any] = (),
    ) -> None:
        """`unheld`: tensors that no table of a module has (in lists, globals, closures), by where Dynamo read them.

        `code`: of all functions that it went through. `filled`: attributes that were as they begin while it ran.
        """
        obstacle = "lines of its code were written anew for the trace" if removed else None
        obstacle = obstacle or ("it reads tensors that no module has" if unheld else None)
        obstacle = obstacle or ("it keeps what it filled in when it was first called" if filled else None)
        obstacle = obstacle or ("a part of it is TorchScript" if has_scripts(model) else None)
        self._code: CodeType = traced.__code__
        self._removed = tuple(removed)
        self._globals = traced.__globals__  # where the guards look for what Dynamo put there
        self._inference = torch.is_inference_mode_enabled()
        self._threads = torch.get_num_threads()
        self._unguarded = Unguarded(model, code)
        self.traced = Traced(frozenset(code), self._unguarded.variables, obstacle)
        self._unheld = [(s, compile(s, "<source>", "eval"), weakref.ref(t)) for s, t in unheld.items() if s]

    def changed(self, model: nn.Module, call: CallSpec) -> str | None:
        """What is another now, in words for a log; None: nothing that the trace read. `call` is that of the trace."""
        if reason := self._unguarded.changed(model):
            return reason
        if any(each.changed for each in self._removed):
            return "the code of a function, or what it makes a table of"
        guards = self._guards()
        if guards is None:
            return "an object that forward reads was replaced"
        # What the traced function reads: `capture._fresh_forward`.
        args, kwargs, _ = call.traced
        there = {"model": model, "args": args, "kwargs": kwargs, "sizes": vocabularies(model), "given": call.given}
        for source, code, tensor in self._unheld:
            if not _same_tensor(self._read(code, there), tensor()):
                return f"another tensor is {_plain(source)}"
        with torch.no_grad(), torch.inference_mode(self._inference), torch.no_grad(), outside_autocast():
            with opened(model):
                same = guards.check(there)
            if same:
                return None
            # A second look, where things are as they were during the trace that mean nothing else afterwards.
            with (
                alone(),
                plain_layers(),
                _threads(self._threads),
                unfilled(refillable(model, call)),
                rewritten(self._removed),
                scripts_as_python(model),
                opened(model),
            ):
                return None if guards.check(there) else _reason(guards.check_verbose(there))

    def _read(self, code: CodeType, there: Mapping[str, Any]) -> Any:
        try:
            return eval(code, {"G": self._globals, "L": there, "___from_numpy": _from_numpy})
        except Exception:  # what held it is not what it was
            return None

    def _guards(self) -> Any | None:
        """The guards; Dynamo drops them when an object that they know by its address is gone."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        entries = _debug_get_cache_entry_list(self._code)
        return entries[-1].guard_manager if entries else None


def _from_numpy(value: Any) -> Any:
    """A tensor of the array's memory. A number of numpy's has none of its own, and stays what it is."""
    return value if isinstance(value, np.generic) else torch.as_tensor(value)


def _same_tensor(now: Any, before: Tensor | None) -> bool:
    """Whether it is the same memory, read in the same way: an array of numpy's is another tensor each time."""
    if isinstance(now, np.generic) and before is not None:
        return bool(torch.equal(torch.as_tensor(now), before))
    if now is before or not isinstance(now, Tensor) or before is None:
        return now is before
    told = ((t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (now, before))
    return now.layout is before.layout is torch.strided and len(set(told)) == 1


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Dynamo's guards know the number of threads, which changes nothing here: for a second look it is the old one."""
    now = torch.get_num_threads()
    if now == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(now)


def _reason(found: Any) -> str:
    parts = found.verbose_code_parts
    return _plain(parts[0].split("  #")[0].strip()) if parts else "the state that forward reads"


def _plain(source: str) -> str:
    """A place as Dynamo writes it, as a user would."""
    return source.replace("L['model']", "model")
