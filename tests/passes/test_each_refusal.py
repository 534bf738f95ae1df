"""Every kind of refusal has a decoder that is refused with exactly that kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import DIM, Tiny
from oracles import EAGER
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.errors import Refusal
from treespec_compiler.options import Options
from treespec_compiler.pipeline import convert
from treespec_compiler.program.early_exit import EarlyExitProgram

INF = float("inf")


class Small(Tiny):
    layers = 1


class Sorts(Small):
    """Python's own sorting of numbers of a tensor."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * len(eval("[1, 2]", {}, {})))


class Branches(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 2 if x.sum() > 0 else x)


class Raises(Small):
    def start(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            raise ValueError("one token at a time")
        return super().start(ids)


class Fixed(Small):
    """Only as many tokens as the example has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taps", torch.ones(11, 1))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * self.taps.expand(-1, DIM)) if x.shape[1] == 11 else self.head(x * len(range(x.shape[1])))


class Lone(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * 1.5 if x.shape[1] == 1 else x)


class Counts(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x * float(x.shape[1]))


class BelowZero(Small):
    def positions(self, ids: Tensor) -> Tensor:
        return torch.arange(-3, ids.shape[1] - 3)[:, None] * self.wpe.weight[:1]


class Bidirectional(Small):
    def mask(self, tokens: int) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool)


class HiddenByContent(Small):
    """Keys are hidden by what their embedding holds."""

    def forward(self, ids: Tensor) -> Tensor:
        self.seen = self.embed(ids)[..., 0] > 0
        return super().forward(ids)

    def mask(self, tokens: int) -> Tensor:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril() & self.seen[0, None, :]


class Replaced(Small):
    """Scores of keys that are seen are not q k^T."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        steps = torch.arange(q.shape[2])
        scores = (q @ k.transpose(-1, -2)).masked_fill(steps[:, None] - steps[None] > 3, 0.5)
        return scores.masked_fill(steps[None] > steps[:, None], -INF).softmax(-1) @ v


class Rows(Small):
    def block(self, x: Tensor, layer: int) -> Tensor:
        return x.tanh()


class Sums(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.cumsum(1))


@torch.library.custom_op("treespec_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x * 2


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(opaque(x))


class Calls(Small):
    calls = 0

    def finish(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x * self.calls)


class Autocast(Small):
    def finish(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.head(x).float()


class Drops(Small):
    def finish(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(x, 0.5, training=True))


class Marked(Tensor):
    pass


class Wrapped(Small):
    def setup(self) -> None:
        self.scale = nn.Parameter(torch.ones(DIM).as_subclass(Marked))


class Silent(Small):
    def finish(self, x: Tensor) -> Any:
        return None


class Two(Tiny):
    """Its second layer reads what the first one read, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        return self.finish(self.block(x, 0) + self.block(self.block(x, 0), 1))


def _converted(model: nn.Module) -> None:
    program = treespec.tree_program(model, options=EAGER)
    program.new_cache(8)


def _left_early(model: nn.Module) -> None:
    EarlyExitProgram(treespec.tree_program(model, options={**EAGER, "verify": "off"}), 2)


def _tapped(model: nn.Module) -> None:
    program = treespec.tree_program(model, options={**EAGER, "verify": "off"})
    program.verify(treespec.TokenTree([1], [-1]), program.new_cache(8), outputs=("hidden:1",))


def _for_ranks(model: nn.Module) -> None:
    convert(model, call_spec(model), Options.parse({**EAGER, "mesh": "tp=7"}))


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]
DECODERS: dict[Refusal, Case] = {
    Refusal.NO_GRAPH: (Sorts, _converted),
    Refusal.CONTROL: (Branches, _converted),
    Refusal.RAISES: (Raises, _converted),
    Refusal.SPECIALISED: (Fixed, _converted),
    Refusal.BRANCH: (Lone, _converted),
    Refusal.LENGTH: (Counts, _converted),
    Refusal.POSITIONS: (BelowZero, _converted),
    Refusal.MASK: (Bidirectional, _converted),
    Refusal.CONTENT: (HiddenByContent, _converted),
    Refusal.ATTENTION: (Replaced, _converted),
    Refusal.NO_ATTENTION: (Rows, _converted),
    Refusal.MIXER: (Sums, _converted),
    Refusal.UNKNOWN_OP: (Opaque, _converted),
    Refusal.STATE: (Calls, _converted),
    Refusal.ROUNDING: (Autocast, _converted),
    Refusal.TRAINING: (Drops, _converted),
    Refusal.SUBCLASS: (Wrapped, _converted),
    Refusal.CALL: (Silent, _converted),
    Refusal.EARLY_EXIT: (Tiny, _left_early),
    Refusal.RESIDUAL: (Two, _tapped),
    Refusal.MESH: (Small, _for_ranks),
}


@pytest.mark.parametrize("kind", Refusal)
def test_it_is_refused_with_this_kind(kind: Refusal) -> None:
    assert kind in DECODERS, f"no decoder is refused with {kind.name}: write one"
    factory, use = DECODERS[kind]
    torch.manual_seed(0)
    with pytest.raises(treespec.Unsupported) as refused:
        use(factory().eval())
    assert refused.value.kind is kind, refused.value
    assert refused.value.reason and str(refused.value)
