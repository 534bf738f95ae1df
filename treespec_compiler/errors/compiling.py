"""What goes wrong while a program is made: tools, tables, weights, passes, kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar

from .base import TreespecError


@dataclass(eq=False, kw_only=True)
class InvalidWeight(TreespecError, ValueError):
    """A weight that is not what a weight expression was made for, or an expression that cannot be made."""

    got: str
    expected: str
    fix: str = "Weights of one model belong together; a size that does not divide stays whole (replicate it)."
    template: ClassVar[str] = "Invalid weight: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class MissingPackage(TreespecError, ImportError):
    """A package that only some commands need."""

    package: str
    purpose: str
    fix: str
    template: ClassVar[str] = "{e.package} is not installed: got no such package, expected one for {e.purpose}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class MissingCompiler(TreespecError, RuntimeError):
    """No C++ compiler, which Inductor's code for a CPU needs."""

    looked_for: str
    template: ClassVar[str] = (
        "No C++ compiler: got none (looked for {e.looked_for}), expected one that Inductor can build code with. "
        'Install g++ or name one in CXX, or have the program run op by op: option lowering="eager", or the environment '
        "variable TREESPEC_LOWERING=eager."
    )


@dataclass(eq=False, kw_only=True)
class CorruptTable(TreespecError, ValueError):
    """A table of measurements that does not parse or has the wrong schema."""

    path: str
    problem: str
    expected: str = "a JSON object with schema, meta and entries"
    template: ClassVar[str] = "Corrupt {e.kind} {e.path}: got {e.problem}, expected {e.expected}. {e.next_step}"

    @property
    def latency(self) -> bool:
        """Whether it is one of forward passes, by the folder it lies in; else it is one of kernels."""
        return PurePath(self.path).parent.name == "latency"

    @property
    def kind(self) -> str:
        return "latency table" if self.latency else "tuning table"

    @property
    def next_step(self) -> str:
        if self.latency:
            return "It is made anew when it is needed; `treespec tune --latency --target MODEL` makes a thorough one."
        return "Delete the file; `treespec tune MODEL --device cuda` makes it again."


@dataclass(eq=False, kw_only=True)
class CaptureFailed(TreespecError, RuntimeError):
    """A step that cannot be recorded as a CUDA graph."""

    problem: str
    template: ClassVar[str] = (
        "A step cannot be recorded as a CUDA graph: got {e.problem}, expected kernels that never wait for the device. "
        'Use the option cuda_graphs="auto", which runs such a program kernel by kernel, or False.'
    )


@dataclass(eq=False, kw_only=True)
class WrongKernel(TreespecError, RuntimeError):
    """A generated kernel that gives wrong numbers on this device: Triton compiled it wrongly."""

    kernel: str
    error: float
    tolerance: float
    versions: str
    template: ClassVar[str] = (
        "A generated kernel is wrong on this device: got an error of {e.error:.1e} against the reference for "
        "{e.kernel}, expected at most {e.tolerance:.1e}. Nothing was computed with it. Please report it with "
        '{e.versions}; until then, use the option kernels="aten", or another version of Triton.'
    )


@dataclass(eq=False, kw_only=True)
class PassError(TreespecError, RuntimeError):
    """A pass broke its promise: the graph after it does not satisfy the level's rules. A bug in the pass."""

    pass_name: str
    problem: str
    expected: str = "a graph that satisfies the rules of its level"
    user: bool = False
    """Whether the pass is the user's own."""
    template: ClassVar[str] = (
        "Pass {e.pass_name!r} left a wrong graph: got {e.problem}, expected {e.expected}. {e.whose}"
    )

    @property
    def whose(self) -> str:
        if self.user:
            return f"Nothing was converted: mend the pass, or take it out of the pipeline (-{self.pass_name})."
        return "This is a bug in treespec, nothing was converted: please report it with the model's code."


@dataclass(eq=False, kw_only=True)
class InvalidPipeline(TreespecError, ValueError):
    """A pipeline string, or the order it asks for, that cannot be run."""

    got: str
    expected: str
    fix: str = "`treespec passes` lists the passes in order."
    template: ClassVar[str] = "Invalid pipeline: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class InvalidMixer(TreespecError, ValueError):
    """A function that cannot be entered as a recurrence."""

    name: str
    got: str
    expected: str
    template: ClassVar[str] = "Mixer {e.name!r}: got {e.got}, expected {e.expected}. See docs/hybrids.md."


@dataclass(eq=False, kw_only=True)
class InvalidKernel(TreespecError, ValueError):
    """A kernel that cannot be registered."""

    name: str
    got: str
    expected: str
    fix: str = "docs/writing-a-kernel.md says what a kernel is registered with."
    template: ClassVar[str] = "Invalid kernel {e.name!r}: got {e.got}, expected {e.expected}. {e.fix}"
