"""How much memory weights may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is allowed: `bytes` of weights in memory, the ring's included, of which `slots` layers; None: as many as
    their size asks for (`plan.ring_slots`)."""

    bytes: int
    slots: int | None = None
