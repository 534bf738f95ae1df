"""The base of every error: how a text is made of fields, and how an error is pickled."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, ClassVar


class TreespecError(Exception):
    """Base of every error of this package."""

    template: ClassVar[str] = ""
    """Format string of the text; `{e.name}` reads a field or a property of the exception."""

    def __str__(self) -> str:
        return self.template.format(e=self) if self.template else super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        # NOTE: the default rebuilds from `args`, which keyword arguments never reach.
        if not is_dataclass(self):
            return super().__reduce__()  # type: ignore[return-value]
        return _rebuild, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})


def _rebuild(cls: type[TreespecError], values: dict[str, Any]) -> TreespecError:
    return cls(**values)
