"""A value that is another one, or was written, is told from the one that was marked."""

from __future__ import annotations

import weakref

import pytest
import torch

from treespec_compiler.capture.marks import ValueMark

VALUES = {
    "tensor": lambda: torch.ones(3),
    "number": lambda: 3.5,
    "nothing": lambda: None,
    "list": lambda: [torch.ones(2), torch.ones(3)],
    "tuple": lambda: (torch.ones(2), 7),
    "dict": lambda: {5: torch.ones(2)},
    "other": object,
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_the_same_value_fits(make) -> None:
    value = make()
    assert ValueMark(value).fits(value)


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "dict", "other"])
def test_an_equal_one_made_anew_is_another(kind) -> None:
    first, second = VALUES[kind](), VALUES[kind]()
    assert not ValueMark(first).fits(second)


def test_one_that_was_written_is_another() -> None:
    value = [torch.ones(2)]
    mark = ValueMark(value)
    value[0].add_(1)
    assert not mark.fits(value)
    mark = ValueMark(value)
    value.append(None)  # type: ignore[arg-type]
    assert not mark.fits(value)
    assert not ValueMark(1).fits(True) and not ValueMark(1).fits(1.0) and not ValueMark(1).fits(2)


def test_one_in_the_place_of_a_tensor_that_is_gone() -> None:
    """As soon as a tensor is gone, the next one made may have its id; its version is 0 as well."""
    same = 0
    for _ in range(50):
        value = torch.ones(300, 4)
        mark, before = ValueMark(value), id(value)
        del value
        value = torch.zeros(64, 4)
        same += id(value) == before
        assert not mark.fits(value)
    assert same, "no id was used again: the test shows nothing"


def test_the_tensor_itself_may_be_swapped() -> None:
    """`swap_tensors` refuses a tensor that something refers to weakly."""
    value, other = torch.ones(3), torch.zeros(3)
    mark = ValueMark(value)
    assert not weakref.getweakrefs(value)
    torch.utils.swap_tensors(value, other)
    assert not mark.fits(value) and mark.fits(other)


def test_a_tensor_without_memory() -> None:
    value = torch.eye(3).to_sparse()
    mark = ValueMark(value)
    assert mark.fits(value) and not mark.fits(torch.eye(3).to_sparse())
