"""bfloat16 as a GPU computes it, in Triton's interpreter.

The interpreter keeps bfloat16 as uint16, the bits. Loads, stores, selections and copies of bits are right. But `tl.dot`
multiplies the bits as integers, casts from float32 cut bits off, casts of subnormals and to integers are wrong, and
arithmetic is that of integers. Within `exact_bfloat16` casts between float32 and bfloat16 are exact or rounded to
nearest, ties to even, and products of bfloat16 accumulate in float32. Our kernels do no other arithmetic in bfloat16:
what else would be wrong raises. Kernels must be made for the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 of bfloat16 bits, uint16 of any shape: its upper half."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 of any shape to bfloat16 bits, to nearest, ties to even. NaN stays a NaN, of its sign."""
    bits = np.ascontiguousarray(x, np.float32).reshape(x.shape).view(np.uint32)
    # NOTE: the carry into the exponent is meant: it gives the next power of two, and infinity above the largest number
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, nearest).astype(np.uint16)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def cast(original: Any, self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    """`cast_impl` by way of float32, which is exact but for float64: that would be rounded twice."""
    to = dst_type.scalar
    if is_bfloat16(src) and to != tl.bfloat16:
        wide = TensorHandle(widened(src.data), tl.float32)
        return wide if to == tl.float32 else original(self, wide, dst_type)
    if to == tl.bfloat16 and not is_bfloat16(src):
        if src.dtype.scalar not in (tl.float32, tl.float16):
            raise NotImplementedError(f"got a cast from {src.dtype} to bfloat16, expected one from float32 or float16")
        return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)
    return original(self, src, dst_type)


def cast_rounding(original: Any, self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
    """`create_fp_to_fp`: of casts of bfloat16, those that round as `cast` does."""
    if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
        return original(self, src, dst_type, rounding)
    if rounding != ir.ROUNDING_MODE.RTNE:
        raise NotImplementedError(f"got a cast of bfloat16 that rounds by {rounding}, expected to nearest even")
    return self.cast_impl(src, dst_type)


def dot(original: Any, self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """`create_dot`: products of two bfloat16 are exact in float32, and so is accumulation as far as it is anywhere."""
    a, b = (TensorHandle(widened(x.data), tl.float32) if is_bfloat16(x) else x for x in (a, b))
    return original(self, a, b, *rest)


def refuse(original: Any, self: Any, *operands: Any) -> TensorHandle:
    """Any other arithmetic; `np.where`, a choice between bits, is none."""
    if any(map(is_bfloat16, operands)) and np.where not in operands:
        raise NotImplementedError("got arithmetic in bfloat16, expected a cast to float32 before it")
    return original(self, *operands)


HOOKS = {
    "cast_impl": cast,
    "create_fp_to_fp": cast_rounding,
    "create_dot": dot,
    **dict.fromkeys(("binary_op", "unary_op", "ternary_op", "create_fma"), refuse),
}
"""Methods of `InterpreterBuilder` that all arithmetic on floats goes through (Triton 3.6 to 3.9), and their changes."""


@contextlib.contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Kernels launched within compute bfloat16 as a GPU does. Also a decorator of tests."""
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        raise RuntimeError("this Triton keeps bfloat16 in another way, expected uint16: is this file still needed?")
    missing = [name for name in HOOKS if not callable(getattr(InterpreterBuilder, name, None))]
    if missing:
        raise RuntimeError(f"this Triton's InterpreterBuilder has no {', '.join(missing)}: bfloat16 would be wrong")
    with contextlib.ExitStack() as stack:
        for name, changed in HOOKS.items():
            method = functools.partialmethod(functools.partial(changed, getattr(InterpreterBuilder, name)))
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, method))
        yield
