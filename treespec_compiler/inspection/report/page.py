"""The page: one HTML file with its style, script and data inside; it needs no network."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any


def page(content: dict[str, Any]) -> str:
    here = files(__package__)
    # NOTE "</script>" inside a source line would end the script.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "TITLE": escape(f"treespec: {content['model']}"),
        "STYLE": _text(here, "page.css"),
        "SCRIPT": _text(here, "page.js"),
    }
    text = _text(here, "page.html")
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text.replace("@DATA@", data)


def _text(folder: Any, name: str) -> str:
    return str(folder.joinpath(name).read_text(encoding="utf-8"))
