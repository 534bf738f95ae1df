"""Arguments that a caller makes from the number of tokens: masks, positions, tables. They are made anew for any number.

`example` may be a function from token ids to a call, which is traced with the model. In an example of tensors, a causal
mask [.., T, T] and positions 0 .. T - 1 are known by their values, and a BlockMask of flex_attention by its function;
they are made for the number of tokens at hand. What they mean in the model is proved as if it made them itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The call that a function makes of token ids.
SuppliedArguments = tuple[tuple[Any, ...], dict[str, Any]]
MadeArgument = Callable[[int, torch.device], Any]

_LEAST = 3  # tokens, for what an argument is to be seen


@dataclass(frozen=True)
class ByFunction:
    """The calls that the user's function makes of token ids, and further keywords."""

    function: Callable[[Tensor], Any]
    more: tuple[tuple[str, Any], ...] = ()

    def __call__(self, ids: Tensor) -> SuppliedArguments:
        made = self.function(ids)
        if isinstance(made, Mapping):
            return (), dict(made) | dict(self.more)
        return (tuple(made) if isinstance(made, (tuple, list)) else (made,)), dict(self.more)


@dataclass(frozen=True)
class ByValue:
    """The example's call with masks and positions of other lengths."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    tokens: str
    made: tuple[tuple[str, MadeArgument], ...]
    """Arguments (a place, as text, or a name), and what makes them."""

    def __call__(self, ids: Tensor) -> SuppliedArguments:
        made = {key: make(ids.numel(), ids.device) for key, make in self.made}
        made[self.tokens] = ids
        args = tuple(made.get(str(i), value) for i, value in enumerate(self.args))
        return args, {key: made.get(key, value) for key, value in self.kwargs}


def by_value(args: tuple[Any, ...], kwargs: Mapping[str, Any], roles: Mapping[str, str], length: int) -> ByValue | None:
    """The example's call where some of its arguments are made from the number of tokens; None: none is."""
    tokens = next(key for key, role in roles.items() if role == "tokens")
    values = {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    made: list[tuple[str, MadeArgument]] = []
    for key, value in values.items():
        # A BlockMask has no role: it serves one number of tokens.
        if length >= _LEAST and (roles.get(key) == "constant" or not isinstance(value, Tensor)):
            found = _made(value, length)
            made += [(key, found)] if found is not None else []
    if not made:
        return None
    made += [
        (key, Positions(values[key].dim(), values[key].dtype)) for key, role in roles.items() if role == "positions"
    ]
    return ByValue(args, tuple(kwargs.items()), tokens, tuple(made))


@dataclass(frozen=True)
class Positions:
    """0 .. T - 1 in the last of so many dimensions."""

    rank: int
    dtype: torch.dtype

    def __call__(self, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(tokens, dtype=self.dtype, device=device).view([1] * (self.rank - 1) + [tokens])


@dataclass(frozen=True)
class Mask:
    """[.., T, T], with one number where the key comes after the query and another elsewhere."""

    rank: int
    dtype: torch.dtype
    seen: float
    hidden: float

    def __call__(self, tokens: int, device: torch.device) -> Tensor:
        past = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if self.dtype is torch.bool:
            mask = past if self.seen else ~past
        else:
            full = torch.full((tokens, tokens), self.seen, dtype=self.dtype, device=device)
            mask = full.masked_fill(~past, self.hidden)
        return mask.view([1] * (self.rank - 2) + [tokens, tokens])


@dataclass(frozen=True)
class Blocks:
    """A BlockMask of T queries and T keys."""

    mask_mod: Callable[..., Tensor]
    batch: int
    heads: int
    block_size: tuple[int, int]

    def __call__(self, tokens: int, device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        sizes = (self.batch, self.heads, tokens, tokens)
        return create_block_mask(self.mask_mod, *sizes, device=str(device), BLOCK_SIZE=self.block_size)


def _made(value: Any, length: int) -> MadeArgument | None:
    """What makes such an argument for any number of tokens; None: it is not known to depend on it."""
    if isinstance(value, Tensor):
        return _mask(value, length) or _positions(value, length)
    flex = sys.modules.get("torch.nn.attention.flex_attention")  # who has a BlockMask has imported it
    if flex is None or not isinstance(value, flex.BlockMask) or value.seq_lengths != (length, length):
        return None
    batch, heads = value.kv_num_blocks.shape[:2]
    return Blocks(value.mask_mod, batch, heads, value.BLOCK_SIZE)


def _mask(value: Tensor, length: int) -> Mask | None:
    if value.dim() < 2 or value.numel() != length**2 or [*value.shape[-2:]] != [length, length]:
        return None
    seen, hidden = value.flatten()[0].item(), value.flatten()[1].item()
    found = Mask(value.dim(), value.dtype, seen, hidden)
    return found if seen != hidden and torch.equal(found(length, value.device), value) else None


def _positions(value: Tensor, length: int) -> Positions | None:
    if value.dtype not in (torch.int64, torch.int32) or not value.dim() or value.numel() != length:
        return None
    found = Positions(value.dim(), value.dtype)
    if value.shape[-1] != length:
        return None
    return found if torch.equal(found(length, value.device), value) else None
