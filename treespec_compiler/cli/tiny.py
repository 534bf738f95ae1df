"""`--tiny`: a configuration with the same switches and few, small layers."""

from __future__ import annotations

from typing import Any

from .coverage.models import OVERRIDES, merge, shrunk


def shrink(config: Any) -> Any:
    """A configuration of the same class whose sizes are small and whose every other field is kept."""
    small = merge(shrunk(config), OVERRIDES.get(config.model_type, {}))
    return type(config).from_dict(merge(config.to_dict(), small))
