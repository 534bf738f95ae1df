"""Compiles Triton kernels for a target that is not there: instructions, registers and spills without a GPU."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    # backend, architecture, threads of a warp, bytes of shared memory a block may have
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
TOOL_TIMEOUT = 120
CALL_FRAME = 16


@dataclass(frozen=True)
class Resources:
    """Of a thread: registers, and bytes of its stack (spilled registers lie there, and the frames of calls). Of a
    block: shared bytes."""

    registers: int
    stack: int
    shared: int
    shared_limit: int
    frame: int = 0
    """Of `stack`, what a call takes: NVIDIA's float64 division is one."""

    @property
    def spills(self) -> bool:
        return self.stack > self.frame

    @property
    def fits(self) -> bool:
        """No spills, and not more shared memory than a block may have."""
        return not self.spills and self.shared <= self.shared_limit


class Offline:
    """A kernel compiled for `target`."""

    def __init__(self, target: str, compiled: Any) -> None:
        self.target = target
        self._compiled = compiled

    @property
    def ptx(self) -> str:
        """PTX, or AMD's assembly."""
        return self._compiled.asm["ptx" if "ptx" in self._compiled.asm else "amdgcn"]

    @functools.cached_property
    def sass(self) -> str:
        """The machine's instructions."""
        if "cubin" not in self._compiled.asm:
            return self.ptx
        return _nvidia_tool("nvdisasm", "-c", cubin=self._compiled.asm["cubin"])

    def has(self, instruction: str) -> bool:
        """Whether the instructions name this one, as HGMMA, HMMA or v_mfma."""
        return instruction in self.sass

    @functools.cached_property
    def resources(self) -> Resources:
        shared, limit = int(self._compiled.metadata.shared), TARGETS[self.target][3]
        if "cubin" not in self._compiled.asm:
            numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", self.ptx, re.MULTILINE)}
            return Resources(
                numbers["vgpr_count"] + numbers["agpr_count"], numbers["private_segment_fixed_size"], shared, limit
            )
        usage = _nvidia_tool("cuobjdump", "-res-usage", cubin=self._compiled.asm["cubin"])
        numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        frame = CALL_FRAME if re.search(r"\bCALL\b", self.sass) else 0
        return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, limit, frame)


def compile_offline(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 2,
    divisible: Iterable[str] = (),
    fusion: bool = True,
) -> Offline:
    """Compile a `triton.jit` function; no GPU and no driver is needed.

    `signature`: argument -> "*fp16", "i32", ... for every argument that is no constexpr. `divisible`: arguments that
    are multiples of 16, as most pointers and strides are. `fusion`: a product and a sum may be rounded once.

    Raises what Triton raises, and ValueError for an unknown target and where the kernel was made for the interpreter
    (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"got target {target!r}, expected one of {', '.join(TARGETS)}")
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(f"got a {type(kernel).__name__}, expected a triton.jit function (unset TRITON_INTERPRET)")
    names = kernel.arg_names
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    backend, arch, warp, _ = TARGETS[target]
    compiled = triton.compile(
        ASTSource(kernel, types, dict(constexprs), attrs=attributes),
        target=GPUTarget(backend, arch, warp),
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion},
    )
    return Offline(target, compiled)


def _nvidia_tool(name: str, *options: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), *options, file.name], capture_output=True, text=True, timeout=TOOL_TIMEOUT, check=True
        )
    return done.stdout
