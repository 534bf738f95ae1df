"""Generates the Triton source of tree attention for one `AttentionKernel`: `templates/tree_attention.py.jinja`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from treespec_compiler.ir.specs import MaskSpec

from .. import tables
from .tree_attention_spec import AttentionKernel, Config

if TYPE_CHECKING:
    from ..printer import Printer

TEMPLATE = "tree_attention.py.jinja"
DISTANCE_TABLE = "tl.load(bias + {head} * distances + tl.maximum({distance}, 0)).to(tl.float32)"


@functools.lru_cache(256)
def source(spec: AttentionKernel) -> str:
    """The text of a module with two kernels: `attend`, and `merge` for when `attend` shares the keys out."""
    # NOTE sympy and Jinja are imported here, not by every process that enters the kernel into the registry
    from treespec_compiler.ir import formulas

    from ..printer import HELPERS
    from .templates import template

    formula = formulas.score(spec.softcap, spec.slopes, spec.bias)
    printer = _printer(spec, "")
    score = printer.doprint(formula)
    exact, dense = spec.dtype == torch.float32, _is_dense(spec)
    return template(TEMPLATE).render(
        spec=spec,
        score=score,
        score_formula=formula,
        helpers=[HELPERS[name] for name in sorted(printer.helpers)],
        seen_prefix="" if dense else _printer(spec, "n[None, :]").doprint(_beyond_causal(spec)),
        seen_tree="" if dense else _printer(spec, "(q_pos[:, None] - distance)").doprint(_beyond_causal(spec)),
        dense=dense,
        distances=not dense or spec.slopes or spec.bias,
        exact=exact,
        precise=', input_precision="ieee"' if exact else "",
        cast="" if spec.dtype == spec.pool_dtype else ".to(q0.dtype)",
        value_block=1 << (spec.value_dim - 1).bit_length(),
    )


def _printer(spec: AttentionKernel, key: str) -> Printer:
    """`key`: the code of a key's position. Distances and scores are tiles [BLOCK_M, keys]."""
    from ..printer import TRITON, Printer

    names = {"s": "s", "q": "q_pos[:, None]", "k": key, "d": "distance", "h": "head[:, None]"}
    tables: dict[str, Callable[..., str]] = {
        "slopes": lambda head: "slope[:, None]",
        "bias": lambda head, distance: DISTANCE_TABLE.format(head=head, distance=distance),
    }
    return Printer(TRITON, names, tables)


def _beyond_causal(spec: AttentionKernel) -> Any:
    """The predicate on keys of a query's own path, in positions and distances."""
    from treespec_compiler.ir import formulas

    return formulas.by_distance(formulas.without_causal(formulas.predicate(spec.mask)))


def _is_dense(spec: AttentionKernel) -> bool:
    """Whether every committed token is seen."""
    return _beyond_causal(spec) == True  # noqa: E712  (sympy's true)


def _shown(
    dims: tuple[int, int], dtype: torch.dtype, pool_dtype: torch.dtype, *mask: int, **scores: Any
) -> AttentionKernel:
    window, chunk = mask or (0, 0)
    return AttentionKernel(4, 2, *dims, dtype, pool_dtype, MaskSpec(window, None, chunk), **scores)


SHOWN = (
    _shown((128, 128), torch.bfloat16, torch.bfloat16),
    _shown((80, 48), torch.float32, torch.float32),
    _shown((192, 20), torch.float16, torch.float32, 6, 0, sinks=True),
    _shown((64, 64), torch.bfloat16, torch.bfloat16, 0, 8, softcap=30.0),
    _shown((64, 64), torch.float32, torch.float32, 9, 5, softcap=3.0, slopes=True, bias=True, sinks=True),
    _shown((96, 96), torch.bfloat16, torch.bfloat16, slopes=True),
    _shown((96, 96), torch.bfloat16, torch.bfloat16, bias=True),
)
"""Specs whose text shows every line that a kernel can have: what a tuning table's hash is made of."""


tables.OPS["tree_attention"] = tables.Tuned(lambda: map(source, SHOWN), Config.parse)
