"""Headers of quantized blocks, kept beside the tensors that a file's blocks were blown up to.

Who reads a file says what it knows (`keep`); who packs a weight asks (`stored_weights.headers_of`). What is kept is a
hint only: a form that needs it compares every value, so that headers of other numbers are of no use and do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .narrow import FORMS


@dataclass(frozen=True, eq=False)
class Headers:
    """Of the blocks of a matrix [N, K]."""

    form: str
    """One of the `FORMS` that have headers."""
    bytes: Tensor
    """[N, blocks, the form's header], uint8."""

    def narrowed(self, dim: int, start: int, stop: int) -> Headers | None:
        """Those of the values from `start` to `stop` along `dim`; None where that cuts a block."""
        unit = FORMS[self.form].k_block if dim else 1
        if start % unit or stop % unit:
            return None
        return Headers(self.form, self.bytes.narrow(dim, start // unit, (stop - start) // unit))


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(tensor: Tensor, headers: Headers) -> None:
    """As long as the tensor is there."""
    _KEPT[tensor] = headers


def kept(tensor: Tensor) -> Headers | None:
    found: Headers | None = _KEPT.get(tensor)
    return found
