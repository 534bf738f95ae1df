"""Decoders whose forward says, checks, looks up and wraps things that no graph has: what they compute is the same."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from typing import Any

import torch
from modules import DIM, VOCAB, Tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Break(Tiny):
    layers = 1


class Prints(Break):
    def start(self, ids: Tensor) -> Tensor:
        print("ids", ids.shape)
        return super().start(ids)


class AsksForALogger(Break):
    def start(self, ids: Tensor) -> Tensor:
        logging.getLogger(__name__).debug("ids %s", ids.shape)
        warnings.warn("an old argument", stacklevel=2)
        return super().start(ids)


class Raises(Break):
    """Two checks in one function."""

    def start(self, ids: Tensor) -> Tensor:
        if ids.max() >= VOCAB:
            raise ValueError(f"got {ids.max()}")
        if ids.min().item() < 0:
            raise ValueError("negative")
        return super().start(ids)


class Asserts(Break):
    def finish(self, x: Tensor) -> Tensor:
        assert not torch.isnan(x).any() and bool((x.abs() < 1e6).all()), "not finite"
        return super().finish(x)


class TellsOfNan(Break):
    """The check is in a free function, and tells only."""

    def finish(self, x: Tensor) -> Tensor:
        look(x)
        return self.head(x)


def look(x: Tensor) -> None:
    if torch.isinf(x).any().item():
        print("infinite", x.max())
        logging.warning("infinite")


class TellsItsLogger(Break):
    def setup(self) -> None:
        self.logger = logging.getLogger(__name__)

    def finish(self, x: Tensor) -> Tensor:
        if x.amax() > 1e3:
            self.logger.info("large")
            logging.getLogger(__name__).info("large")
        try:
            assert not x.isnan().any()
        except AssertionError as error:
            raise ValueError("nan") from error
        return self.head(x)


class InAClosure(Break):
    def setup(self) -> None:
        self.scale = 1.0

    def finish(self, x: Tensor) -> Tensor:
        assert x.sum() == x.sum()
        return super().finish(x) * self.scale


class Checkpointed(Break):
    def block(self, x: Tensor, layer: int) -> Tensor:
        return checkpoint(super().block, x, layer, use_reentrant=False)


class CheckpointedTwice(Break):
    """One inside the other, the older kind outside."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(super(CheckpointedTwice, self).block, x, layer, use_reentrant=False)

        return checkpoint(inner, x, use_reentrant=True)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


class AutogradFunction(Break):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(Squared.apply(x))


class CompiledSubmodule(Break):
    def setup(self) -> None:
        self.more = torch.compile(nn.Linear(DIM, DIM))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.more(x))


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class ScriptedFunction(Break):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(swish(x))


class CachedMask(Break):
    @functools.lru_cache(maxsize=4)  # noqa: B019
    def causal(self, tokens: int) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def mask(self, tokens: int) -> Tensor:
        return self.causal(tokens)


class LengthAsInt(Break):
    def positions(self, ids: Tensor) -> Tensor:
        return self.wpe(torch.arange(len(ids[0])))


CONVERTED: tuple[type[Break], ...] = (
    Prints,
    AsksForALogger,
    Raises,
    Asserts,
    TellsOfNan,
    TellsItsLogger,
    InAClosure,
    Checkpointed,
    CheckpointedTwice,
    AutogradFunction,
    CompiledSubmodule,
    ScriptedFunction,
    CachedMask,
    LengthAsInt,
)


class Doubles(Break):
    """The branch computes something."""

    def finish(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return self.head(x)


class ReturnsEarly(Break):
    def finish(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x @ self.head.weight.T * 2
        return self.head(x)


class RaisesOrDoubles(Break):
    def finish(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("nan")
        else:
            return self.head(x * x.amax().item())


class ChecksAndChanges(Break):
    """The test itself has an effect."""

    def finish(self, x: Tensor) -> Tensor:
        if not x.add_(1).isfinite().all():
            raise ValueError("not finite")
        return self.head(x)


class NamesInATest(Break):
    def finish(self, x: Tensor) -> Tensor:
        if not (y := x * 2).isfinite().all():
            raise ValueError("not finite")
        return self.head(y)


class Catches(Break):
    """What the check raises chooses what is computed."""

    def finish(self, x: Tensor) -> Tensor:
        try:
            if x.amax() > 1e3:
                raise OverflowError
        except OverflowError:
            x = x.clamp(max=1e3)
        return self.head(x)


class CatchesElsewhere(Break):
    """As above, two functions away."""

    def finish(self, x: Tensor) -> Tensor:
        with contextlib.suppress(OverflowError):
            self.checked(x)
            x = x * 2
        return self.head(x)

    def checked(self, x: Tensor) -> None:
        if x.amax() > 1e3:
            raise OverflowError


class LogsItself(Break):
    """`log` is a method of its own, and tells nobody."""

    def setup(self) -> None:
        self.scale = 1.0

    def finish(self, x: Tensor) -> Tensor:
        if x.amax() > 1e3:
            self.log(x)
        return self.head(x * self.scale)

    def log(self, x: Tensor) -> None:
        self.scale = 2.0


class AsksItself(Break):
    """`any` is a method of its own, and counts."""

    def setup(self) -> None:
        self.asked = 0

    def finish(self, x: Tensor) -> Tensor:
        assert not self.any(x)
        return self.head(x)

    def any(self, x: Tensor) -> bool:
        self.asked += 1
        return bool(x.isnan().any())


class LogarithmInPlace(Break):
    def finish(self, x: Tensor) -> Tensor:
        if x.amin() > 10:
            torch.log(x, out=x)
        return self.head(x)


REFUSED: tuple[type[Break], ...] = (
    Doubles,
    ReturnsEarly,
    RaisesOrDoubles,
    ChecksAndChanges,
    NamesInATest,
    Catches,
    CatchesElsewhere,
    LogsItself,
    AsksItself,
    LogarithmInPlace,
)
