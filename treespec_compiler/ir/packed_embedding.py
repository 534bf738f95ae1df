"""`treespec::packed_embedding`: rows of a packed weight, for a model whose embedding is its head's matrix.

A packed weight holds every value exactly, so that a row read from it is the row of the table, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .linear import NUMBERED_FORMS, unpack_weight
from .narrow import FORMS
from .panels import PANEL
from .private_torch import OpOverload

SCHEMA = '(Tensor ids, Tensor packed, SymInt num_embeddings, str form="") -> Tensor'


def reference(ids: Tensor, packed: Tensor, num_embeddings: int, form: str = "") -> Tensor:
    """ids [..], 0 .. num_embeddings - 1, -> [.., K]. No `form`: float32. Raises IndexError for other ids."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_embeddings:
        raise IndexError(f"got ids {int(ids.min())} to {int(ids.max())}, expected 0 to {num_embeddings - 1}")
    panels, at = packed[ids.flatten() // PANEL], ids.flatten() % PANEL
    rows = unpack_weight(panels, len(panels) * PANEL, form or "float32")
    every = torch.arange(len(panels), device=ids.device) * PANEL + at
    return rows[every].view(*ids.shape, rows.shape[1])


def fake(ids: Tensor, packed: Tensor, num_embeddings: int, form: str = "") -> Tensor:
    narrow = FORMS.get(form)
    columns = packed.shape[1] * (narrow.k_block if narrow is not None else 1)
    return ids.new_empty(*ids.shape, columns, dtype=packed.dtype if narrow is None else torch.float32)


packed_embedding: OpOverload = define("packed_embedding", SCHEMA, reference, fake, texts={"form": NUMBERED_FORMS})
