"""Small decoders that begin and end in the ways people write: what they take, what they return, and of which token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from modules import CONTEXT, DIM, VOCAB, Tiny
from torch import Tensor, nn
from torch.nn import functional as F


class End(Tiny):
    """One layer; `row(output)` gives the logits [V] of the last token."""

    layers = 1
    example: Any = None
    roles: ClassVar[dict[str, str] | None] = None

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        """What forward is called with, for ids [1, T]."""
        return (ids,)

    def row(self, output: Any) -> Tensor:
        return output.reshape(-1, output.shape[-1])[-1]


class LastOfList(End):
    """nanoGPT's: the head of the last token alone, and no loss."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        x = self.block(self.start(ids), 0)
        if targets is not None:
            logits = self.head(x)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return self.head(x[:, [-1], :]), None

    def row(self, output: Any) -> Tensor:
        return output[0][0, -1]


class LastOfSlice(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1:])


class LastOfSelect(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1])


class LastByLength(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, x.shape[1] - 1 : x.shape[1]])


class LastByIndex(End):
    def finish(self, x: Tensor) -> Tensor:
        last = torch.tensor([x.shape[1] - 1])
        return self.head(x[torch.arange(x.shape[0]), last])


class LastOfBatch(End):
    """[V] logits of the only text."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[0, -1])


class LastThenNorm(End):
    """Everything behind the last layer for one token: norm, a bottleneck, a capped and cut vocabulary."""

    def setup(self) -> None:
        self.norm, self.small, self.large = nn.LayerNorm(DIM), nn.Linear(DIM, 8), nn.Linear(8, VOCAB + 9)

    def finish(self, x: Tensor) -> Tensor:
        x = self.norm(x[:, -1, :])
        x = torch.cat([x, -x], -1).view(1, 2, DIM).sum(1) + x
        logits = self.large(self.small(x).relu())[..., :VOCAB]
        return 5 * torch.tanh(logits / 5).squeeze(1).log_softmax(-1)


class LastOfLogits(End):
    """The pick comes after the head."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x)[:, -1, :]


class LastAndIds(End):
    """What is picked of the hidden state and of the ids meets again."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.start(ids), 0)[:, -1:] + self.embed(ids[:, -1:]))


class LastTimeFirst(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(0, 1)[-1])


class NoneFirst(End):
    def finish(self, x: Tensor) -> Any:
        return None, self.head(x)

    def row(self, output: Any) -> Tensor:
        return output[1][0, -1]


class LossFirst(NoneFirst):
    def finish(self, x: Tensor) -> Any:
        return torch.zeros(()), self.head(x)


class LogitsLast(NoneFirst):
    """The hidden state before the logits: only one has the size of the vocabulary."""

    def finish(self, x: Tensor) -> Any:
        return x, self.head(x)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@dataclass
class Scores:
    loss: Tensor | None
    scores: Tensor


class Pair(NamedTuple):
    loss: Any
    scores: Tensor


class OfDataclass(End):
    def finish(self, x: Tensor) -> Any:
        return Output(None, self.head(x))

    def row(self, output: Any) -> Tensor:
        return output.logits[0, -1]


class OfOtherDataclass(End):
    def finish(self, x: Tensor) -> Any:
        return Scores(None, self.head(x))

    def row(self, output: Any) -> Tensor:
        return output.scores[0, -1]


class OfNamedTuple(OfOtherDataclass):
    def finish(self, x: Tensor) -> Any:
        return Pair(None, self.head(x))


class OfMapping(End):
    def finish(self, x: Tensor) -> Any:
        return {"loss": None, "logits": self.head(x), "hidden": x}

    def row(self, output: Any) -> Tensor:
        return output["logits"][0, -1]


class OfMappingWithOneTensor(End):
    def finish(self, x: Tensor) -> Any:
        return {"output": self.head(x)}

    def row(self, output: Any) -> Tensor:
        return output["output"][0, -1]


class TimeFirst(End):
    """Logits [T, B, V]."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(0, 1)


class Flat(End):
    """Logits [T, V]."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x).view(-1, VOCAB)


class VocabularyFirst(End):
    """Logits [B, V, T], as cross_entropy wants them."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x).transpose(1, 2)

    def row(self, output: Any) -> Tensor:
        return output[0, :, -1]


class IdsTimeFirst(TimeFirst):
    """Ids [T, B]."""

    example = torch.zeros(11, 1, dtype=torch.int64)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (ids.t(),)

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids.t())


class IdsAlone(Flat):
    """Ids [T], logits [T, V]."""

    example = torch.zeros(11, dtype=torch.int64)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return (ids[0],)

    def start(self, ids: Tensor) -> Tensor:
        return super().start(ids[None])


class PositionsGiven(End):
    """Position ids as a required argument."""

    example = (torch.zeros(1, 11, dtype=torch.int64), torch.arange(11))
    roles: ClassVar[dict[str, str] | None] = {"positions": "positions"}

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ids, torch.arange(ids.shape[1])

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.finish(self.block(self.embed(ids) + self.wpe(positions), 0))


class TableGiven(End):
    """A table of positions as a required argument, cut to the text inside."""

    table = torch.linspace(-1, 1, CONTEXT * DIM).view(CONTEXT, DIM).sin()
    example = (torch.zeros(1, 11, dtype=torch.int64), table)

    def arguments(self, ids: Tensor) -> tuple[Any, ...]:
        return ids, self.table

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return self.finish(self.block(self.embed(ids) + table[: ids.shape[1]], 0))


CONVERTED: tuple[type[End], ...] = (
    LastOfList,
    LastOfSlice,
    LastOfSelect,
    LastByLength,
    LastByIndex,
    LastOfBatch,
    LastThenNorm,
    LastOfLogits,
    LastAndIds,
    LastTimeFirst,
    NoneFirst,
    LossFirst,
    LogitsLast,
    OfDataclass,
    OfOtherDataclass,
    OfNamedTuple,
    OfMapping,
    OfMappingWithOneTensor,
    TimeFirst,
    Flat,
    VocabularyFirst,
    IdsTimeFirst,
    IdsAlone,
    PositionsGiven,
    TableGiven,
)


class SecondLast(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -2:-1])


class First(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0])


class MeanOfLastTwo(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -2:].mean(1))


class MeanOfAll(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1] + x.mean(1))


class LastIntoOthers(End):
    """A head that mixes the last token into all."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + x[:, -1:])


class LastBesideFirst(End):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1] * x[:, 0])


class LastByNumber(End):
    """The tenth token is the last one of some texts only."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, 10])


class LastAndLength(End):
    """The head sees how long the text is."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1] * x.shape[1])


class LastAndPlace(End):
    """The head reads a table at the last place, which is no place in a tree."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, -1] + self.wpe(torch.tensor(x.shape[1] - 1)))


class NoLogits(End):
    def finish(self, x: Tensor) -> Any:
        return None, torch.zeros(())


class TwoOfMapping(End):
    def finish(self, x: Tensor) -> Any:
        return {"a": self.head(x), "b": self.head(x)}


REFUSED: tuple[type[End], ...] = (
    SecondLast,
    First,
    MeanOfLastTwo,
    MeanOfAll,
    LastIntoOthers,
    LastBesideFirst,
    LastByNumber,
    LastAndLength,
    LastAndPlace,
    NoLogits,
    TwoOfMapping,
)
