"""Kernels' text, as files that read top to bottom: Jinja templates (https://jinja.palletsprojects.com)."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


@functools.cache
def _environment() -> Environment:
    """Lines that hold only a statement leave nothing behind, and a name that is not given is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # code, not a page
    )


def template(name: str) -> Template:
    return _environment().get_template(name)
