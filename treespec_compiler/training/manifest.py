"""Whose folder it is: what a run was asked for, so that a run that goes on there is the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptTable, InvalidOption, UnreadableModel
from ..user_cache import read_table, write_whole

SCHEMA = 1


def claim(path: Path, said: Mapping[str, Any], name: str) -> None:
    """Write down what is asked for, or check that the same was. Raises InvalidOption for another run's folder.

    `said` is what JSON can hold; `name` is the argument that names the folder.
    """
    now = json.loads(json.dumps({"schema": SCHEMA, **said}))
    before = recorded(path)
    if before is None:
        write_whole(path, json.dumps(now, indent=1) + "\n")
        return
    differ = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if differ:
        what = "; ".join(f"{key} {_short(before.get(key))} there, {_short(now.get(key))} here" for key in differ[:3])
        fix = "Name another folder, or ask for the same as before."
        expected = "an empty folder, or one of a run that was asked for the same"
        raise InvalidOption(name=name, got=f"{path.parent} of another run ({what})", expected=expected, fix=fix)


def recorded(path: Path) -> dict[str, Any] | None:
    """What was written down, if anything was. Raises UnreadableModel."""
    if not path.exists():
        return None
    try:
        return read_table(path, SCHEMA)
    except CorruptTable as error:
        fix = "Delete the folder, or name another."
        expected = "what a run was asked for"
        raise UnreadableModel(name=str(path), problem=error.problem, expected=expected, fix=fix) from error


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
