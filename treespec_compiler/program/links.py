"""What goes from pipeline stage to pipeline stage, point to point: the residual stream of a call's new nodes.

A rank receives from, and sends to, the rank of the neighbouring stage that has the same share of every layer. Behind
the stream goes one number, which says whether the sender is well: a rank whose neighbour is gone tells the next stages
so, or they would wait for it until the timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.inputs import STREAM
from ..passes.framework.state import GraphState
from .ranks import Ranks, joined

_WELL, _LOST = 1.0, 0.0


class Link:
    """This rank's place in a row of stages. Raises RuntimeError where another rank is gone."""

    def __init__(self, state: GraphState, ranks: Ranks) -> None:
        assert state.stage is not None
        self._ranks, self._last = ranks, state.stage.last
        self._logits: Any = state.logits_value
        streams = [n for n in state.graph.nodes if n.op == "placeholder" and n.name == STREAM.name]
        self._into: Any = streams[0].meta["val"] if streams else None
        """A fake value like what comes in, [1, T, D]; None in the first stage."""
        self._out: Any = None if state.stage.last else state.output.args[0][0].meta["val"]
        tp = ranks.mesh.tp
        self._before, self._after = ranks.rank + tp, ranks.rank - tp

    @classmethod
    def of(cls, state: GraphState) -> Link | None:
        """None: the graph is a whole model's. Raises `InvalidOption` where the ranks are not there."""
        return None if state.stage is None else cls(state, joined(state.stage.mesh))

    def run(self, nodes: int, run: Callable[[Tensor | None], Sequence[Tensor]]) -> Sequence[Tensor]:
        """`run` on what comes in, [1, nodes, D] or None in the first stage; its outputs [1, ..], handed on.

        Where anything fails, the next stages are told before it is raised.
        """
        try:
            outputs = run(None if self._into is None else self._receive(nodes))
            if self._out is not None:
                self._send(outputs[0], _WELL, nodes)
        except BaseException:
            if self._out is not None:
                with contextlib.suppress(RuntimeError):
                    self._send(None, _LOST, nodes)
            raise
        return outputs

    def shared(self, outputs: Sequence[Tensor], rows: int) -> list[Tensor]:
        """The last stage's logits [rows, V], on every rank."""
        logits = outputs[0].contiguous() if self._last else self._logits_room(rows)
        dist.broadcast(logits, src=0, group=self._ranks.whole)
        return [logits]

    def largest(self, value: int) -> int:
        """The largest value that a rank has."""
        return self._ranks.largest(value)

    def _logits_room(self, rows: int) -> Tensor:
        like = self._logits
        return torch.empty(rows, like.shape[-1], dtype=like.dtype, device=like.device)

    def _receive(self, nodes: int) -> Tensor:
        flat = _room(self._into, nodes)
        dist.recv(flat, src=self._before, group=self._ranks.whole)
        if flat[-1] != _WELL:
            raise RuntimeError("a rank of an earlier stage is gone")
        return flat[:-1].view(1, nodes, -1)

    def _send(self, value: Tensor | None, well: float, nodes: int) -> None:
        flat = _room(self._out, nodes)
        if value is not None:
            flat[:-1].view(nodes, -1).copy_(value.reshape(nodes, -1))
        flat[-1] = well
        dist.send(flat, dst=self._after, group=self._ranks.whole)


def _room(like: Any, nodes: int) -> Tensor:
    """For the stream of so many nodes, and the number behind it."""
    return torch.empty(nodes * int(like.shape[2]) + 1, dtype=like.dtype, device=like.device)
