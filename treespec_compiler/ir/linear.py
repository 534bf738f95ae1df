"""`treespec::packed_linear`: x @ weight.T + bias on a weight packed for few rows of x.

A packed weight is [panels, K, 32]: panel p holds, for each k, the weights of outputs 32 p .. 32 p + 31, and zeros past
the last output. One pass over it in memory order serves every row of x, and 32 floats are two AVX-512, four AVX2 or
eight NEON vectors. Narrower forms of the same numbers are those of `ir.narrow`; the product is that of the float32
values that they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidWeight
from .library import define
from .narrow import FORMS, encode
from .panels import PANEL
from .private_torch import OpOverload

# NOTE the default is no form's name: graphs name theirs, and AOTAutograd drops an argument that equals its default.
SCHEMA = '(Tensor x, Tensor packed, Tensor? bias, SymInt out_features, str form="") -> Tensor'

NUMBERED_FORMS = (
    *("", "float32", "bfloat16", "float16", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k"),
    *("i4", "i8", "q5_0", "q5_1", "q5_k"),
)
"""As codegen/cpu/ops.cpp numbers them."""


def pack_weight(weight: Tensor, form: str = "float32", headers: Tensor | None = None) -> Tensor:
    """[N, K] -> [panels, K, PANEL], or what another form makes of it (`ir.narrow`).

    Weights that share an input may be concatenated along N before. `headers`: of the blocks, where the form has them.
    Raises InvalidWeight where the form does not hold every value exactly.
    """
    if form != "float32":
        narrow = FORMS[form]
        fits = weight.dtype is torch.float32 and narrow.takes(weight.shape[1])
        packed = encode(weight, narrow, headers) if fits else None
        if packed is None:
            raise InvalidWeight(got="other numbers", expected=f"a float32 matrix that {form} holds exactly")
        return packed
    n, k = weight.shape
    panels = -(-n // PANEL)
    packed = weight.new_zeros(panels * PANEL, k)
    packed[:n] = weight
    return packed.view(panels, PANEL, k).transpose(1, 2).contiguous()


def unpack_weight(packed: Tensor, out_features: int, form: str = "float32") -> Tensor:
    """A packed weight -> [N, K]."""
    if form != "float32":
        return FORMS[form].decode(packed)[:out_features]
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features]


def packed_bytes(packed: Tensor) -> int:
    return packed.numel() * packed.element_size()


def reference(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, form: str = "") -> Tensor:
    """x [..., K] -> [..., N], contiguous. No `form`: float32, or whatever dtype x and the weight have."""
    return torch.nn.functional.linear(x, unpack_weight(packed, out_features, form or "float32"), bias).contiguous()


def fake(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, form: str = "") -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


packed_linear: OpOverload = define("packed_linear", SCHEMA, reference, fake, texts={"form": NUMBERED_FORMS})
