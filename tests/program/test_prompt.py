"""Prompts from everything that users have them in, and what is refused."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch

from treespec_compiler.errors import InvalidOption, InvalidPrompt, WrongType
from treespec_compiler.program.prompt import parse_prompt, parse_prompts

ONE = {
    "list": [3, 1, 4],
    "tuple": (3, 1, 4),
    "range": range(3, 6),
    "iterator": iter([3, 1, 4]),
    "list of one list": [[3, 1, 4]],
    "list of numpy integers": [np.int64(3), np.int32(1), np.uint8(4)],
    "list of tensors without dimensions": list(torch.tensor([3, 1, 4])),
    "list of one tensor": [torch.tensor([3, 1, 4])],
    "tensor [S]": torch.tensor([3, 1, 4]),
    "tensor [1, S]": torch.tensor([[3, 1, 4]], dtype=torch.int32),
    "array [S]": np.array([3, 1, 4]),
    "array [1, S]": np.array([[3, 1, 4]], dtype=np.int16),
    "dict": {"input_ids": torch.tensor([[3, 1, 4]])},
    "dict of lists": {"input_ids": [3, 1, 4], "attention_mask": [1, 1, 1]},
    "BatchEncoding": UserDict(
        input_ids=np.array([[0, 3, 1, 4]]), attention_mask=np.array([[0, 1, 1, 1]]), token_type_ids=np.zeros((1, 4))
    ),
}


@pytest.mark.parametrize("given", ONE.values(), ids=ONE.keys())
def test_one_prompt(given):
    expected = [3, 4, 5] if isinstance(given, range) else [3, 1, 4]
    ids, device = parse_prompt(given)
    assert ids == expected and all(type(i) is int for i in ids)
    assert device == torch.device("cpu")


def test_the_list_is_copied():
    given = [1, 2]
    ids, _ = parse_prompt(given)
    given.append(3)
    assert ids == [1, 2]


def test_the_device_of_tensors():
    with pytest.raises(NotImplementedError):  # it has no values, which is all that is known here of another device
        parse_prompt(torch.empty(2, dtype=torch.int64, device="meta"))


SEVERAL = {
    "lists": [[1], [2, 3]],
    "tensors": [torch.tensor([1]), torch.tensor([[2, 3]])],
    "lists and arrays": [np.array([1]), (2, 3)],
    "padded left": {"input_ids": torch.tensor([[9, 1], [2, 3]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
    "padded right": {"input_ids": [[1, 9], [2, 3]], "attention_mask": [[True, False], [True, True]]},
}


@pytest.mark.parametrize("given", SEVERAL.values(), ids=SEVERAL.keys())
def test_several_prompts(given):
    assert parse_prompts(given).ids == [[1], [2, 3]]
    with pytest.raises(InvalidPrompt, match=r"got a batch of 2 prompts, expected one prompt, \[S\] or \[1, S\]"):
        parse_prompt(given)


def test_a_mask_beside_the_ids():
    ids, mask = torch.tensor([[7, 7, 1, 2], [3, 7, 7, 7]]), torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert parse_prompts(ids, mask).ids == [[1, 2], [3]]


BAD = {
    "nothing": ([], "got no ids, expected at least one"),
    "an empty prompt among others": ([[1], []], "got no ids"),
    "nothing but padding": ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "got no ids"),
    "text": ("hello", "got a str, expected token ids"),
    "texts": (["hello"], r"got 'hello' \(str\) at index 0, expected integer token ids"),
    "a number": (5, "got a int, expected token ids"),
    "None": (None, "got a NoneType"),
    "a fraction": ([1, 2.5], r"got 2\.5 \(float\) at index 1"),
    "a truth value": ([1, True], r"got True \(bool\) at index 1"),
    "a tensor of fractions": (torch.zeros(3), r"dtype torch\.float32, expected torch\.int64"),
    "a tensor of bfloat16": (torch.zeros(3, dtype=torch.bfloat16), r"dtype torch\.bfloat16"),
    "a tensor of truth values": (torch.zeros(3, dtype=torch.bool), r"dtype torch\.bool"),
    "an array of fractions": (np.zeros(3), "dtype float64"),
    "an array of objects": (np.array([[1], [2, 3]], dtype=object), "dtype object"),
    "three dimensions": (torch.zeros(1, 1, 3, dtype=torch.int64), r"shape \[1, 1, 3\]"),
    "no dimension": (torch.tensor(3), r"shape \[\]"),
    "ids and lists": ([1, [2]], r"got 1 \(int\) at index 0 of a list of prompts"),
    "a batch in a list": ([torch.zeros(2, 2, dtype=torch.int64)], "got 2 prompts at index 0"),
    "a mapping without ids": ({"ids": [1]}, "got a mapping of 'ids', expected one with 'input_ids'"),
    "embeddings": ({"input_ids": [1], "inputs_embeds": torch.zeros(1, 1, 4)}, "got 'inputs_embeds' beside the ids"),
    "segments": ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, "got 'token_type_ids' beside the ids"),
    "another size of mask": ({"input_ids": [1, 2], "attention_mask": [1]}, "an attention_mask for 1 tokens"),
    "a gap": ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "an attention_mask with a gap"),
}


@pytest.mark.parametrize(("given", "text"), BAD.values(), ids=BAD.keys())
def test_what_is_no_prompt_is_refused(given, text):
    with pytest.raises(InvalidPrompt, match=text):
        parse_prompt(given)


def test_a_mask_of_another_type_is_a_type_error():
    with pytest.raises(WrongType, match=r"Invalid option attention_mask: got 1, expected a tensor, array or list"):
        parse_prompts([1, 2], 1)
    assert issubclass(WrongType, TypeError) and issubclass(WrongType, InvalidOption)
