"""Token ids of prompts from what users have: lists, tensors, arrays, and what a tokenizer returns."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidPrompt, WrongType

PromptLike: TypeAlias = (
    Tensor | NDArray[np.integer[Any]] | Mapping[str, Any] | Sequence[int] | Sequence[Sequence[int] | Tensor]
)
"""Integers; a tensor or array [S] or [B, S]; a list of prompts; or a mapping such as `BatchEncoding` that has
"input_ids" and may have "attention_mask"."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Prompts:
    """What was given, as lists."""

    ids: list[list[int]]
    """Of each prompt, without padding."""
    device: torch.device
    """Where they came from; the CPU for lists and arrays."""


def parse_prompts(given: Any, attention_mask: Any = None) -> Prompts:
    """One prompt or several. Raises `InvalidPrompt`.

    `attention_mask`, in the shape of the ids, tells tokens (1) from padding (0) on the left or right of a prompt.
    """
    if isinstance(given, Mapping):
        given, attention_mask = _of_tokenizer(given, attention_mask)
    rows, device = _rows(given, "token ids")
    if attention_mask is not None:
        if not _is_row(attention_mask):
            expected = "a tensor, array or list in the shape of the ids"
            raise WrongType(name="attention_mask", got=attention_mask, expected=expected)
        masks, _ = _rows(attention_mask, "numbers of an attention_mask", flags=True)
        if [len(mask) for mask in masks] != [len(row) for row in rows]:
            got = f"an attention_mask for {_sizes(masks)} tokens"
            raise InvalidPrompt(got=got, expected=f"one for {_sizes(rows)}", fix="Give both as the tokenizer did.")
        rows = [_unpadded(row, mask) for row, mask in zip(rows, masks, strict=True)]
    if not rows or not all(rows):
        raise InvalidPrompt(got="no ids", expected="at least one")
    return Prompts(rows, device)


def parse_prompt(
    given: Any, attention_mask: Any = None, *, several: str = "Give each of them alone, or all to `generate`."
) -> tuple[list[int], torch.device]:
    """As `parse_prompts`, for one prompt: its ids and device. `several`: what to do with more of them."""
    if type(given) is list and given and set(map(type, given)) == {int} and attention_mask is None:
        return [*given], CPU  # what is asked again and again
    prompts = parse_prompts(given, attention_mask)
    if len(prompts.ids) != 1:
        got = f"a batch of {len(prompts.ids)} prompts"
        raise InvalidPrompt(got=got, expected="one prompt, [S] or [1, S]", fix=several)
    return prompts.ids[0], prompts.device


def _of_tokenizer(given: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    """The ids and the mask of a tokenizer's output; what else it holds must mean nothing."""
    if "input_ids" not in given:
        names = ", ".join(map(repr, given)) or "nothing"
        raise InvalidPrompt(
            got=f"a mapping of {names}", expected="one with 'input_ids'", fix="Pass the ids themselves."
        )
    for name, value in given.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name == "token_type_ids" and not np.any(np.asarray(value)):
            continue  # "all one text"; a model that reads them takes zeros by itself
        fix = f"Take {name!r} out, if the model does not need it."
        raise InvalidPrompt(got=f"{name!r} beside the ids", expected="'input_ids' and 'attention_mask' alone", fix=fix)
    found = given.get("attention_mask")
    return given["input_ids"], found if attention_mask is None else attention_mask


def _rows(given: Any, what: str, *, flags: bool = False) -> tuple[list[list[int]], torch.device]:
    """Every prompt as a list of integers."""
    if isinstance(given, (Tensor, np.ndarray)):
        return _array_rows(given, flags), given.device if isinstance(given, Tensor) else CPU
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise InvalidPrompt(got=f"a {type(given).__name__}", expected=f"{what}: a list or an int64 tensor")
    values = list(given)
    if not any(_is_row(value) for value in values):
        return [[_integer(value, index, flags) for index, value in enumerate(values)]], CPU
    rows, device = [], CPU
    for index, value in enumerate(values):
        if not _is_row(value):
            got = f"{value!r} ({type(value).__name__}) at index {index} of a list of prompts"
            raise InvalidPrompt(got=got, expected="a list of ids or a list of prompts, not both")
        inner, device = _rows(value, what, flags=flags)
        if len(inner) != 1:
            raise InvalidPrompt(got=f"{len(inner)} prompts at index {index}", expected="one, [S] or [1, S]")
        rows += inner
    return rows, device


def _is_row(value: object) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, (list, tuple, range))


def _array_rows(given: Tensor | NDArray[Any], flags: bool) -> list[list[int]]:
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) and _fits(given, flags) else given
    if isinstance(array, Tensor) or array.dtype.kind not in ("iub" if flags else "iu"):
        got = f"ids of dtype {given.dtype}"
        raise InvalidPrompt(got=got, expected="torch.int64", fix="Convert: `input_ids.to(torch.int64)`.")
    if array.ndim not in (1, 2):
        fix = "Flatten: `input_ids.flatten()`."
        raise InvalidPrompt(got=f"ids of shape {list(given.shape)}", expected="[S], [1, S] or [B, S]", fix=fix)
    rows: list[list[int]] = np.atleast_2d(array).astype(np.int64).tolist()
    return rows


def _fits(given: Tensor, flags: bool) -> bool:
    """Whether it holds integers: not every dtype of torch is one of numpy's."""
    return not given.is_floating_point() and not given.is_complex() and (flags or given.dtype is not torch.bool)


def _integer(value: object, index: int, flags: bool) -> int:
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and not _fits(value, flags)):
        number = int(value) if flags else None
    else:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = None
    if number is None:
        got = f"{value!r} ({type(value).__name__}) at index {index}"
        raise InvalidPrompt(got=got, expected="integer token ids")
    return number


def _unpadded(ids: list[int], mask: list[int]) -> list[int]:
    ones = sum(1 for flag in mask if flag)
    first = next((index for index, flag in enumerate(mask) if flag), 0)
    if not all(mask[first : first + ones]):
        fix = "Take out what is masked between the tokens of a prompt."
        raise InvalidPrompt(got="an attention_mask with a gap", expected="padding on the left or right", fix=fix)
    return ids[first : first + ones]


def _sizes(rows: list[list[int]]) -> str:
    return " + ".join(str(len(row)) for row in rows)
