"""Logging from the environment, as `TORCH_LOGS` does it: `TREESPEC_LOGS="+passes,guards,graphs"`.

Every logger of the package is `treespec.NAME`. A name shows messages from INFO on, `+name` from DEBUG on, `-name` only
errors; `all` is the package. `graphs` shows the graph after every pass.
"""

from __future__ import annotations

import logging
import os

VARIABLE = "TREESPEC_LOGS"

ROOT = logging.getLogger("treespec")

_FORMAT = "%(levelname).1s %(name)s: %(message)s"


def set_logs(text: str) -> None:
    """Set levels from a string such as `+passes,-program`; the first call adds a handler that writes to stderr."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    if words and not any(getattr(h, "treespec", False) for h in ROOT.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.treespec = True  # type: ignore[attr-defined]
        ROOT.addHandler(handler)
        ROOT.propagate = False
    for word in words:
        name = word.lstrip("+-")
        level = (
            logging.DEBUG if word[0] == "+" or name == "graphs" else logging.ERROR if word[0] == "-" else logging.INFO
        )
        (ROOT if name in ("all", "treespec") else ROOT.getChild(name)).setLevel(level)


def set_logs_from_environment() -> None:
    set_logs(os.environ.get(VARIABLE, ""))
