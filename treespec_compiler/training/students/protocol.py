"""What is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..texts import WrittenText


class Student(Protocol):
    """A draft that learns. Its weights are float32 leaves, changed in place by an optimizer."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By the names of a checkpoint."""
        ...

    def loss(self, text: WrittenText) -> Tensor:
        """Of all of a text's roots, summed; a scalar in nats."""
        ...

    def hits(self, text: WrittenText) -> Tensor:
        """[roots, depth] bool: whether the likeliest guess at a depth behind a root is the target's, the guesses before
        it taken to be right."""
        ...

    def bytes_of(self, tokens: int) -> int:
        """At most what the loss and its gradients hold for a text of so many tokens, the weights left out."""
        ...

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """As a draft that `generate` reads, in bfloat16; `about` says how it was trained."""
        ...
