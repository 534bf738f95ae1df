"""Calls without texts: of an op with texts among its arguments, an overload that takes numbers for them.

Inductor's C++ wrapper calls an op through torch's stable interface where its schema has numbers, devices and tensors
alone. For one with a string it includes the dispatcher's headers, and every piece of a graph costs some 8 s of the C++
compiler. So an op says of its texts which ones have a number, and a graph is spelled in numbers before it is compiled
(`program.lowering`). Everywhere else, in graphs that are shown, saved and proved, texts stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OVERLOAD = "numbered"

Texts = Mapping[str, tuple[str, ...]]
"""By argument: the texts that have a number, which is their place. A call with another text has no such spelling."""


def numbered_schema(schema: str) -> str:
    """The schema with an int for each str, and without defaults: what a compiler leaves out cannot be told apart."""
    taken, _, given = schema.removeprefix("(").rpartition(") -> ")
    parts = (each.partition("=")[0].rpartition(" ") for each in taken.split(", "))
    arguments = [f"{'int' if kind == 'str' else kind} {name}" for kind, _, name in parts]
    return f"({', '.join(arguments)}) -> {given}"


@dataclass(frozen=True)
class Spelling:
    """Of an op with these arguments, in the order of its schema, the number of each text."""

    names: tuple[str, ...]
    texts: Texts

    def numbers(self, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The arguments by place, with numbers for texts; None: a text has none."""
        if any(values[name] not in known for name, known in self.texts.items()):
            return None
        return tuple(self.texts[n].index(values[n]) if n in self.texts else values[n] for n in self.names)

    def spelled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, called with numbers."""
        places = [(self.names.index(name), known) for name, known in self.texts.items()]

        def numbered(*values: Any) -> Any:
            given = [*values]
            for place, known in places:
                given[place] = known[given[place]]
            return run(*given)

        return numbered
