"""Programs of one model told apart by their example call: a constant argument is part of the program."""

from __future__ import annotations

from typing import Any

import modules
import pytest
import torch
from oracles import EAGER, TOLERANCE, error

import treespec_compiler as treespec
from treespec_compiler.program.keys import argument_key, example_key


class Silent:
    """An object whose `repr` and `==` hide what it holds."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return "Silent()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Silent)

    def __hash__(self) -> int:
        return 0


class Scaled(modules.NanoGPT):
    def forward(self, ids: torch.Tensor, by: Any = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(ids)[0] * (by.scale if isinstance(by, Silent) else by[0])


@pytest.mark.parametrize("values", [(Silent(2.0), Silent(3.0)), ([2.0], [3.0]), ((2,), (3,))])
@pytest.mark.family
def test_constants_with_equal_names_are_two_programs(values: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    ids = torch.arange(9)[None] % 3
    programs = [treespec.tree_program(model, example={"ids": ids, "by": v}, options=EAGER) for v in values]
    assert programs[0] is not programs[1]
    assert treespec.tree_program(model, example={"ids": ids, "by": values[0]}, options=EAGER) is programs[0]
    for program, value in zip(programs, values, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([[3, 1, 4]]), by=value)[0, -1]
        assert error(program.prefill([3, 1, 4], program.new_cache(8)), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (None, "None"),
        ([1], (1,)),
        ({"a": 1}, {"a": 2}),
        (torch.float32, torch.float64),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_what_a_trace_can_tell_apart(one: Any, other: Any) -> None:
    assert argument_key(one) != argument_key(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16),
        lambda: {"a": [1, (2.5, "x")]},
        lambda: torch.empty(0),
    ],
)
def test_equal_values_are_one(make: Any) -> None:
    assert argument_key(make()) == argument_key(make()) and hash(argument_key(make())) == hash(argument_key(make()))


def test_a_list_of_positional_arguments_is_a_tuple_of_them() -> None:
    ids = torch.arange(4)[None]
    assert example_key([ids, 2]) == example_key((ids, 2)) and example_key(ids) == example_key((ids.clone(),))
