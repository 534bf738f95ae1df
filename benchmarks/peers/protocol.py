"""What a worker of bench_cpu_peers.py says, and is asked: a JSON value a line. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request to its answer.

`{"ids": [..], "new": n, "lookup": bool}` asks for n tokens after a prompt, chosen greedily, whatever they are. They are
`{"ids": [..], "seconds": s, "first": f}`, with the time from the prompt to the last of them and to the first.
`{"steps": true}`, of treespec alone, asks for the milliseconds of steps of several rows.
"""


def serve(make: Callable[[], tuple[dict[str, Any], Answer]]) -> None:
    """Say what was made (`bytes`: of the weights, as they are stored), then answer until nothing more is asked.

    A package that is not installed is said (`missing`), and ends it. Whatever else is printed goes to stderr.
    """
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        said.write(json.dumps(value) + "\n")
        said.flush()

    try:
        about, answer = make()
    except ImportError as error:
        say({"missing": str(error)})
        return
    say(about)
    for line in sys.stdin:
        say(answer(json.loads(line)))
