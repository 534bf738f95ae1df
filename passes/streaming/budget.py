"""How much memory weights may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is allowed: `bytes` of weights in memory, the ring's included, of which `slots` layers."""

    bytes: int
    slots: int
