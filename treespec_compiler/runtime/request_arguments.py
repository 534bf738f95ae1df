"""What a request of an engine is asked with, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import InvalidOption


def split_stops(stop: int | str | Sequence[int | str], tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and strings, of what is given as `stop`. Raises InvalidOption."""
    several: Iterable[int | str] = [stop] if isinstance(stop, (int, str)) else stop
    ids, strings = list[int](), list[str]()
    for one in several:
        if isinstance(one, str):
            if not one or tokenizer is None:
                expected = "ids" if tokenizer is None else "ids and strings that are not empty"
                fix = "Strings need `Engine(tokenizer=...)`." if tokenizer is None else ""
                raise InvalidOption(name="stop", got=stop, expected=expected, fix=fix)
            strings.append(one)
        else:
            ids.append(one)
    return ids, strings


def check_integer(name: str, value: object, expected: str, low: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        raise InvalidOption(name=name, got=value, expected=expected)
