"""Decoders that are refused for how they are called, what they return or keep, and what a trace cannot follow; and the
same ones after what the refusal says was done to them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from context_variables import ListInContext, NumberInContext
from modules import CONTEXT, DIM
from pointwise import ByLength, BySeenKeys
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from ways import One, Way, becomes


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


class JoinedPositions(One):
    def positions(self, ids: Tensor) -> Tensor:
        later = torch.arange(ids.shape[1] - 1)
        return self.wpe(torch.cat([torch.zeros(1, dtype=torch.int64), later]))


class TwoHeads(One):
    def finish(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(x), self.head(-x)], 2)


class Named(nn.Module):
    """A dict, which TorchScript has and `script_code` has no line for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        parts = {"first": self.inner(x)}
        return parts["first"]


class Scripted(One):
    def setup(self) -> None:
        self.more: nn.Module = torch.jit.script(Named())

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.more(x))


class NotScripted(Scripted):
    def setup(self) -> None:
        self.more = Named()


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


class NoLogits(One):
    """A loss alone."""

    def finish(self, x: Tensor) -> Any:
        return (self.head(x).logsumexp(-1).mean(),)


class PassesOn(TorchDispatchMode):
    """It sees every op, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def switched_off() -> AbstractContextManager[Any]:
    """Dynamo is."""
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(disable=True)
    return patch


class KeepsKeys(One):
    """Keys are kept, and joined to the next call's."""

    keeps = True

    def setup(self) -> None:
        self.kept: Any = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.keeps:
            self.kept, old = k.sum((0, 2)), self.kept
            k = k if old is None else k + old[None, :, None]
        return super().attend(q, k, v, layer)


class KeepsNothing(KeepsKeys):
    """It is called without its own cache."""

    keeps = False


class SmallPieces(One):
    """A loop over pieces of the text, several of them in any example."""

    piece = 3

    def finish(self, x: Tensor) -> Tensor:
        pieces = [x[:, i : i + self.piece] for i in range(0, x.shape[1], self.piece)]
        return self.head(torch.cat([p.tanh() for p in pieces], 1))


class LongPieces(SmallPieces):
    piece = 64


WAYS: tuple[Way, ...] = (
    Way(ListInContext, "keep a number, a text or a truth value in it", becomes(NumberInContext)),
    Way(ByLength, "torch.arange(1, T + 1)[:, None]", becomes(BySeenKeys)),
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
    Way(JoinedPositions, "only attention may move information between tokens", becomes(PositionsOfTensors)),
    Way(TwoHeads, "return logits of every position, [1, T, V]", becomes(One)),
    Way(Scripted, "the Python module that more was scripted from", becomes(NotScripted)),
    Way(
        AnglesAsArgument,
        "give the example as a function of the token ids",
        example=(torch.zeros(1, 9, dtype=torch.int64), ANGLES[:9]),
        then=cut_angles,
    ),
    Way(GraphBreak, "remove the graph break", becomes(One)),
    Way(NoLogits, "return the logits alone, first, or under the name", becomes(One)),
    Way(One, "switch it on for the conversion", around=switched_off),
    Way(One, "convert the model outside of it", around=PassesOn),
    Way(KeepsKeys, "call it without its own cache", becomes(KeepsNothing)),
    Way(SmallPieces, "pieces as long as the longest text", becomes(LongPieces)),
)
