"""What is shown while a model is converted: the stage, the seconds it has taken, and those it took the last time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import CorruptTable
from ..logs import logger
from ..stages import watched
from ..user_cache import cache_dir, read_table, write_whole

log = logger(__name__)

SCHEMA = 1
MOST = 200
"""Names whose times are kept."""


@contextmanager
def waiting(console: Console, name: str) -> Iterator[None]:
    """Show stages on a terminal until the work is done; what they took is kept under this name."""
    path = cache_dir() / "stages.json"
    known = _read(path)
    before, took = known.get(name, {}), dict[str, float]()
    with _bar(console) as bar:
        task = bar.add_task("")
        now, since = "", time.monotonic()

        def tell(stage: str) -> None:
            nonlocal now, since
            ended = time.monotonic()
            if now:
                took[now] = took.get(now, 0.0) + ended - since
            now, since = stage, ended
            bar.reset(task, description=described(stage, before))

        with watched(tell):
            yield
    if took:  # nothing was converted: a program was there
        _write(path, known, name, took)


def described(stage: str, before: dict[str, float]) -> str:
    """A stage, and what it took the last time where that is known."""
    last = before.get(stage)
    return stage if last is None else f"{stage} ({last:.0f} s the last time)"


def _bar(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = read_table(path, SCHEMA).get("seconds")
    except CorruptTable:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: _numbers(seconds) for name, seconds in found.items() if isinstance(seconds, dict)}


def _numbers(seconds: dict[str, object]) -> dict[str, float]:
    return {stage: float(s) for stage, s in seconds.items() if isinstance(s, (int, float))}


def _write(path: Path, known: dict[str, dict[str, float]], name: str, took: dict[str, float]) -> None:
    """The name's times last; the longest unused ones are left out."""
    kept = [(other, seconds) for other, seconds in known.items() if other != name][-(MOST - 1) :]
    rounded = {stage: round(seconds, 3) for stage, seconds in took.items()}
    try:
        write_whole(path, json.dumps({"schema": SCHEMA, "seconds": {**dict(kept), name: rounded}}))
    except OSError as error:
        log.debug("%s is not written: %s", path, error)
