"""Logging from the environment, as `TORCH_LOGS` does it: `TREESPEC_LOGS="+passes,guards,graphs"`.

A module's logger is its name under `treespec`: `treespec.codegen.gpu.tune`. The variable names rooms or modules without
`treespec`: a name shows messages from INFO on, `+name` from DEBUG on, `-name` only errors; `all` is the package.
`TOPICS` are short names of single modules; `graphs` shows the graph after every pass.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

VARIABLE = "TREESPEC_LOGS"

ROOT = logging.getLogger("treespec")

GRAPHS = ROOT.getChild("graphs")

TOPICS = {
    "guards": "passes.discharge_guards",
    "reproducer": "passes.framework.reproducer",
    "semantics": "program.semantics",
}

_FORMAT = "%(levelname).1s %(name)s: %(message)s"

_PACKAGE = Path(__file__).parent


def logger(module: str) -> logging.Logger:
    """The logger of a module of the package, by its `__name__`: `treespec_compiler.ir.ops` has `treespec.ir.ops`."""
    return ROOT.getChild(module.removeprefix(f"{__package__}."))


def set_logs(text: str) -> None:
    """Set levels from a string such as `+passes,-program`; the first call adds a handler that writes to stderr.

    A name that is no module, room or topic is warned about and sets nothing.
    """
    words = [w.strip() for w in text.split(",") if w.strip()]
    if words and not any(getattr(h, "treespec", False) for h in ROOT.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.treespec = True  # type: ignore[attr-defined]
        ROOT.addHandler(handler)
        ROOT.propagate = False
    for word in words:
        name = word.lstrip("+-")
        found = _named(name)
        if found is None:
            ROOT.warning(
                "%s: got %r, expected all, graphs, %s, or a room or module such as passes, codegen.gpu or program",
                *(VARIABLE, word, ", ".join(TOPICS)),
            )
        elif word[0] == "+" or name == "graphs":
            found.setLevel(logging.DEBUG)
        else:
            found.setLevel(logging.ERROR if word[0] == "-" else logging.INFO)


def _named(name: str) -> logging.Logger | None:
    if name in ("all", "treespec"):
        return ROOT
    if name == "graphs":
        return GRAPHS
    name = TOPICS.get(name, name)
    path = _PACKAGE.joinpath(*name.split("."))
    known = path.is_dir() or path.with_suffix(".py").is_file()
    return ROOT.getChild(name) if name and known else None


def set_logs_from_environment() -> None:
    set_logs(os.environ.get(VARIABLE, ""))
