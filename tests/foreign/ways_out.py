"""Decoders that are refused, and the same ones after what the refusal says was done to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from torch import Tensor, nn

Change = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Way:
    """`before` is refused with `words` in the way out; `change` of it, or `options`, makes it convert."""

    before: type[Tiny]
    words: str
    change: Change = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)
    example: Any = None
    then: Any = None
    """The example after the change."""


def becomes(after: type[Tiny]) -> Change:
    """The same weights under other code."""

    def change(model: nn.Module) -> nn.Module:
        other = after()
        other.load_state_dict(model.state_dict())
        return other

    return change


class One(Tiny):
    layers = 1


class TwoOfMapping(One):
    def finish(self, x: Tensor) -> Any:
        return {"scores": self.head(x), "hidden": x}


class NamedInMapping(One):
    def finish(self, x: Tensor) -> Any:
        return {"logits": self.head(x), "hidden": x}


class BranchOnValues(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x[0, 0, 0] > 0 else x)


class ChoiceOfTensors(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.where(x[..., :1] > 0, x * 2, x))


class PositionsInALoop(One):
    def positions(self, ids: Tensor) -> Tensor:
        return torch.stack([self.wpe.weight[i] for i in range(ids.shape[1])])


class PositionsOfTensors(One):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(ids.shape[1]))


class Dropout(One):
    def setup(self) -> None:
        self.drop = nn.Dropout(0.5)
        self.drop.train()

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x))

    def eval(self) -> Dropout:
        return self  # somebody forgot it


def evaluated(model: nn.Module) -> nn.Module:
    return nn.Module.eval(model)


class OtherWhenLong(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.shape[1] > 30 else x)


class AddsUp(One):
    def setup(self) -> None:
        self.state: Any = None

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        x = x if self.state is None else x + self.state
        self.state = x.mean((0, 1))
        return x


class WritesABuffer(One):
    def setup(self) -> None:
        self.register_buffer("seen", torch.zeros(DIM))

    def start(self, ids: Tensor) -> Tensor:
        self.seen.add_(1)
        return super().start(ids) + self.seen


class WritesNothing(WritesABuffer):
    def start(self, ids: Tensor) -> Tensor:
        return One.start(self, ids) + self.seen


class CountsCalls(One):
    def setup(self) -> None:
        self.calls = 0

    def finish(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x) * (1 if self.calls < 40 else 2)


class UnderAutocast(One):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = super().forward(ids)
        return x.float()


class ChangesAView(One):
    """`type_as` gives its argument, which is then changed."""

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        y = x.type_as(x)
        y += 1
        return x + y


class ChangesACopy(One):
    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        y = x.type_as(x)
        y = y + 1
        return x + y


class ClampedPositions(One):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe((torch.arange(ids.shape[1]) + 3).clamp(max=20))


class TwoHeads(One):
    def finish(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(x), self.head(-x)], 2)


class Scripted(One):
    def setup(self) -> None:
        self.more: nn.Module = torch.jit.script(nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.more(x))


class NotScripted(Scripted):
    def setup(self) -> None:
        self.more = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())


class AnglesAsArgument(One):
    """Angles of positions that the caller cuts to the number of tokens."""

    def forward(self, ids: Tensor, angles: Tensor) -> Tensor:
        return self.finish(self.block(self.embed(ids) + angles.sin(), 0))


ANGLES = torch.arange(CONTEXT)[:, None] * torch.linspace(0.1, 1, DIM)


def cut_angles(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, ANGLES[: ids.shape[1]]


class GraphBreak(One):
    def finish(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.head(x)


WAYS: tuple[Way, ...] = (
    Way(TwoOfMapping, "under the name 'logits'", becomes(NamedInMapping)),
    Way(BranchOnValues, "compute it with tensors alone", becomes(ChoiceOfTensors)),
    Way(PositionsInALoop, "use torch ops on x.shape[1]", becomes(PositionsOfTensors)),
    Way(Dropout, "call model.eval() first", evaluated),
    Way(OtherWhenLong, "options={'max_context': 30}", options={"max_context": 30}),
    Way(AddsUp, "move", becomes(One)),
    Way(WritesABuffer, "move the update out of forward", becomes(WritesNothing)),
    Way(CountsCalls, "move counters and other state of Python out of forward", becomes(One)),
    Way(UnderAutocast, "call the model without autocast", becomes(One)),
    Way(ChangesAView, "change a copy (x = x + y instead of x += y)", becomes(ChangesACopy)),
    Way(ClampedPositions, "positions must count the tokens one by one", becomes(PositionsOfTensors)),
    Way(TwoHeads, "return logits of every position, [1, T, V]", becomes(One)),
    Way(Scripted, "the Python module that more was scripted from", becomes(NotScripted)),
    Way(
        AnglesAsArgument,
        "give the example as a function of the token ids",
        example=(torch.zeros(1, 9, dtype=torch.int64), ANGLES[:9]),
        then=cut_angles,
    ),
    Way(GraphBreak, "remove the graph break", becomes(One)),
)

__all__ = ["CONTEXT", "VOCAB", "WAYS", "Way"]
