"""Prompt ids and end tokens, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextOverflow, InvalidOption, InvalidPrompt, TokenOutOfRange


def parse_prompt(
    input_ids: Tensor | Sequence[int], *, vocab_size: int | None = None, max_context: int | None = None
) -> tuple[list[int], torch.device]:
    """The ids as a list, and the device they came on."""
    device = torch.device("cpu")
    if isinstance(input_ids, Tensor):
        ids, device = _tensor_ids(input_ids), input_ids.device
    else:
        ids = _list_ids(input_ids)
    if not ids:
        raise InvalidPrompt(got="no ids", expected="at least one")
    if vocab_size is None:
        vocab_size = 2**63
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            if vocab_size == 2**63:
                raise InvalidPrompt(got=f"the id {token} at index {index}", expected="ids of 0 or more")
            raise TokenOutOfRange(token=token, index=index, vocab_size=vocab_size)
    if max_context is not None and len(ids) > max_context:
        raise ContextOverflow(position=len(ids) - 1, max_context=max_context)
    return ids, device


def _tensor_ids(ids: Tensor) -> list[int]:
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidPrompt(
            got=f"ids of dtype {ids.dtype}", expected="torch.int64", fix="Convert: `input_ids.to(torch.int64)`."
        )
    if ids.dim() == 2 and ids.shape[0] != 1:
        raise _batch(int(ids.shape[0]))
    if ids.dim() not in (1, 2):
        raise InvalidPrompt(
            got=f"ids of shape {list(ids.shape)}", expected="[S] or [1, S]", fix="Flatten: `input_ids.flatten()`."
        )
    values: list[int] = ids.flatten().tolist()
    return values


def _list_ids(ids: Sequence[int]) -> list[int]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise InvalidPrompt(got=f"a {type(ids).__name__}", expected="token ids: a list or an int64 tensor")
    values = list(ids)
    if values and isinstance(values[0], (list, tuple)):
        if len(values) != 1:
            raise _batch(len(values))
        values = list(values[0])
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidPrompt(got=f"{value!r} ({type(value).__name__}) at index {index}", expected="integer ids")
    return values


def _batch(size: int) -> InvalidPrompt:
    return InvalidPrompt(
        got=f"a batch of {size} prompts",
        expected="one prompt, [S] or [1, S]",
        fix="Batches are not in this version: call `generate` once for every prompt.",
    )


def end_ids(
    eos_token_id: int | Iterable[int] | None, stop_ids: Iterable[int], module: Any
) -> tuple[frozenset[int], frozenset[int]]:
    """End-of-sequence ids (the model's own if None) and stop ids."""
    if eos_token_id is None:
        for holder in ("generation_config", "config"):
            eos_token_id = getattr(getattr(module, holder, None), "eos_token_id", None)
            if eos_token_id is not None:
                break
    return _id_set("eos_token_id", eos_token_id), _id_set("stop_ids", stop_ids)


def _id_set(name: str, ids: Any) -> frozenset[int]:
    if ids is None:
        return frozenset()
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    if isinstance(ids, int) and not isinstance(ids, bool):
        ids = (ids,)
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InvalidOption(name=name, got=ids, expected="an id or several ids")
    values = list(ids)
    if any(not isinstance(i, int) or isinstance(i, bool) for i in values):
        raise InvalidOption(name=name, got=values, expected="integer ids", fix="Encode text with the tokenizer first.")
    return frozenset(values)
