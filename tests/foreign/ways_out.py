"""Decoders that are refused, and the same ones after what the refusal says was done to them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from context_variables import ListInContext, NumberInContext
from decoders import HEAD, Style, future
from modules import CONTEXT, DIM, HEADS, VOCAB, Tiny
from pointwise import ByLength, BySeenKeys
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import treespec_compiler as treespec

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
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """What stands around the conversion that is refused, and is taken away."""


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


class Experts(One):
    """Those that were hit, in a loop over what is known at run time only."""

    def setup(self) -> None:
        self.router = nn.Linear(DIM, 3)
        self.expert = nn.Parameter(torch.randn(3, DIM, DIM))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x + self.routed(x[0], self.router(x[0]).argmax(-1))[None])

    def routed(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique():
            rows = torch.where(chosen == e)[0]
            out[rows] = x[rows] @ self.expert[e].T
        return out


class SortedExperts(Experts):
    def routed(self, x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort()
        ends = torch.histc(chosen.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
        rows = treespec.grouped_linear(x[order], self.expert, ends)
        return torch.zeros_like(x).index_add(0, order, rows)


class OneMemory(One):
    """A K/V cache whose two buffers are parts of one."""

    def setup(self) -> None:
        both = self.caches()
        self.register_buffer("keys", both[0], persistent=False)
        self.register_buffer("values", both[1], persistent=False)

    def caches(self) -> Any:
        return torch.zeros(2, 1, HEADS, CONTEXT, HEAD)

    def forward(self, ids: Tensor, steps: Tensor) -> Tensor:
        x = self.embed(ids) + self.wpe(steps)
        q, k, v = (self.split(part) for part in self.qkv[0](self.norms[0](x)).chunk(3, -1))
        self.keys[:, :, steps] = k
        self.values[:, :, steps] = v
        seen = steps[:, None] >= torch.arange(CONTEXT)
        mixed = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.head(x + self.out[0](self.join(mixed)))


class TwoMemories(OneMemory):
    def caches(self) -> Any:
        return [torch.zeros(1, HEADS, CONTEXT, HEAD) for _ in range(2)]


def with_steps(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.arange(ids.shape[1])


class ByErrorFunction(Style):
    """flex_attention with a mask by a function that nobody knows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        t = q.shape[2]
        blocks = create_block_mask(lambda b, h, i, j: self.seen(b, h, i, j), None, None, t, t, device="cpu")
        out: Any = flex_attention(q, k, v, block_mask=blocks)
        return out

    def seen(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.erfc((i - j) / 1.0) <= 1


class Arithmetic(ByErrorFunction):
    def seen(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j


class EvenLengths(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.shape[1] % 2 else x)


class OneAlone(One):
    """A single token is something else."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.shape[1] == 1 else x)


class NeverOne(One):
    def finish(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise ValueError("one token")
        return self.head(x)


class ScoresOfItsOwn(Style):
    """A softmax to a power is none that is known."""

    def weights(self, scores: Tensor) -> Tensor:
        return (scores / 2).masked_fill(future(scores.shape[-1]), -math.inf).softmax(-1).square()


class RoundedWeights(Style):
    """Attention's weights in a coarser type than its queries."""

    def weights(self, scores: Tensor) -> Tensor:
        return super().weights(scores.bfloat16()).float()


class CoarseAttention(One):
    """Queries, keys and values in a coarser type than every weight."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (x.to(torch.float16) for x in (q, k, v))
        return super().attend(q, k, v, layer).float()


class Centred(One):
    """A convolution that reads the next token."""

    def setup(self) -> None:
        self.near = nn.Conv1d(DIM, DIM, 3, groups=DIM)

    def padded(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (1, 1))

    def start(self, ids: Tensor) -> Tensor:
        x = super().start(ids)
        return x + self.near(self.padded(x.transpose(1, 2))).transpose(1, 2)


class Before(Centred):
    def padded(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (2, 0))


class PickedAlone(One):
    """As many rows as the tokens' content asks for, put in order."""

    def finish(self, x: Tensor) -> Tensor:
        picked = x[x[..., 0] > 0]
        return self.head(x + picked.sum() * 0 + picked[:1].mean())


class ChosenRows(One):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(torch.where(x[..., :1] > 0, x * 2, x))


def in_two(model: nn.Module) -> nn.Module:
    """Parameters that are a subclass of tensors."""
    weight = model.head.weight.detach()
    model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)  # type: ignore[no-untyped-call, union-attr, assignment]
    return model


class Quantized(One):
    def eval(self) -> Quantized:
        in_two(self)
        return self


def plain(model: nn.Module) -> nn.Module:
    assert isinstance(model, Quantized) and isinstance(model.head.weight, TwoTensor)
    model.head.weight = nn.Parameter(model.head.weight.a)
    return model


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
    Way(NoLogits, "return the logits alone, first, or under the name", becomes(One)),
    Way(One, "switch it on for the conversion", around=switched_off),
    Way(One, "convert the model outside of it", around=PassesOn),
    Way(Experts, "with treespec.grouped_linear", becomes(SortedExperts)),
    Way(
        OneMemory,
        "give each buffer its own memory",
        becomes(TwoMemories),
        example=with_steps,
        then=with_steps,
    ),
    Way(ByErrorFunction, "arithmetic, comparisons, torch.where", becomes(Arithmetic)),
    Way(EvenLengths, "make the forward pass the same for every number of tokens", becomes(One)),
    Way(OneAlone, "make the forward pass the same for every number of tokens", becomes(One)),
    Way(NeverOne, "make the forward pass take 1 tokens, or remove the branch", becomes(One)),
    Way(ScoresOfItsOwn, "use torch.nn.functional.scaled_dot_product_attention", becomes(One)),
    Way(RoundedWeights, "compute attention in one type", becomes(Style)),
    Way(CoarseAttention, "leave q, k and v as they are", becomes(One)),
    Way(Centred, "pad 2 zeros in front of the tokens", becomes(Before)),
    Way(PickedAlone, "choose with torch.where", becomes(ChosenRows)),
    Way(Quantized, "convert the model before it is quantized", plain),
)

__all__ = ["CONTEXT", "VOCAB", "WAYS", "Way"]
