"""Convolutions over the tokens: exact where they are causal, refused with the reason where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import DIM, VOCAB
from oracles import EAGER, assert_decodes
from state_cases import Convolved
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.errors import Refusal, Unsupported


class PaddedInFront(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (self.reach, 0)), layer)


class JoinedZeros(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(torch.cat([x.new_zeros(1, DIM, self.reach), x], -1), layer)


class CutByNegative(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(x, layer, padding=self.reach)[:, :, : -self.reach]


class AsModule(Convolved):
    """nn.Conv1d with padding on both sides."""

    def setup(self) -> None:
        self.convs = nn.ModuleList(
            nn.Conv1d(DIM, DIM, 3, groups=DIM, padding=2, bias=bool(i)) for i in range(self.layers)
        )

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.convs[layer](x)[..., : x.shape[2]]


class Dilated(Convolved):
    dilation = 3


class Dense(Convolved):
    groups = 1


class Grouped(Convolved):
    groups = 4


class Late(Convolved):
    """Every tap reads two tokens further back than it must."""

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (self.reach + 2, 0)), layer)[..., : x.shape[2]]


class CutBothWays(Convolved):
    """Padding in front twice, of which the cut takes one away."""

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (4, 0)), layer, padding=self.reach)[..., 4 : x.shape[2] + 4]


@pytest.mark.family
@pytest.mark.parametrize(
    "kind",
    [Convolved, PaddedInFront, JoinedZeros, CutByNegative, AsModule, Dilated, Dense, Grouped, Late, CutBothWays],
)
def test_a_causal_convolution_is_exact(kind: type[Convolved]) -> None:
    torch.manual_seed(2)
    model = kind()
    program = treespec.tree_program(model, options=EAGER)
    assert [s.kind for s in program.states] == ["convolution"] * 2
    for prompt in (1, 3, 5):
        assert_decodes(model, program, VOCAB, rounds=2, prompt=prompt)


class Shifted(Convolved):
    """Each token beside the one before it, as RWKV writes it."""

    back = 1

    def shifted(self, x: Tensor) -> Tensor:
        """x [1, T, D]."""
        return nn.ZeroPad2d((0, 0, self.back, -self.back))(x)

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return x + 0.5 * self.shifted(x.transpose(1, 2)).transpose(1, 2)


class ShiftedByJoin(Shifted):
    def shifted(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1, 1, DIM), x[:, :-1]], 1)


@pytest.mark.family
@pytest.mark.parametrize("kind", [Shifted, ShiftedByJoin])
def test_tokens_that_are_moved_back_are_exact(kind: type[Shifted]) -> None:
    torch.manual_seed(2)
    model = kind()
    program = treespec.tree_program(model, options=EAGER)
    assert [(s.kind, s.shape) for s in program.states] == [("convolution", (kind.back, DIM))] * 2
    for prompt in (1, 3):
        assert_decodes(model, program, VOCAB, rounds=2, prompt=prompt)


class ShiftedAhead(Shifted):
    back = -1


class ShiftedOnes(Shifted):
    """What stands in front of the tokens is not zero."""

    def shifted(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1), value=1.0)


class JoinedEnd(Shifted):
    """The last token stands in front of the first."""

    def shifted(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, -1:], x[:, :-1]], 1)


class ShiftedUnevenly(Shifted):
    """Two zeros in front, one token cut behind, and one in front."""

    def shifted(self, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1, 1, DIM), x[:, 1:]], 1)


@pytest.mark.family
@pytest.mark.parametrize("kind", [ShiftedAhead, ShiftedOnes, JoinedEnd, ShiftedUnevenly])
def test_tokens_that_are_moved_otherwise_are_refused(kind: type[Shifted]) -> None:
    with pytest.raises(Unsupported, match="mixes tokens") as caught:
        treespec.tree_program(kind(), options=EAGER)
    assert "test_convolutions.py" in str(caught.value.source)


class AheadByOne(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(x, layer, padding=self.reach)[..., 1 : x.shape[2] + 1]


class Same(Convolved):
    width = 3

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(x, layer, padding=1)


class AheadDilated(Convolved):
    """Padding for a kernel that is not spread out."""

    dilation = 2

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (self.width - 1, self.width - 1)), layer)


@pytest.mark.parametrize(("kind", "ahead"), [(AheadByOne, 1), (Same, 1), (AheadDilated, 3)])
def test_one_that_looks_ahead_is_refused(kind: type[Convolved], ahead: int) -> None:
    with pytest.raises(Unsupported, match=f"looks ahead by {ahead}: its last tap") as caught:
        treespec.tree_program(kind(), options=EAGER)
    assert caught.value.kind is Refusal.MIXER
    assert "conv1d" in str(caught.value.node) and "state_cases.py" in str(caught.value.source)


class Strided(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        y = self.conv1d(x, layer, padding=self.reach, stride=2)
        return y.repeat_interleave(2, 2)[..., : x.shape[2]]


class Circular(Convolved):
    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (self.reach, 0), mode="circular"), layer)


class Ones(Convolved):
    """What stands in front of the tokens is not zero."""

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(F.pad(x, (self.reach, 0), value=1.0), layer)


class Learned(Convolved):
    def setup(self) -> None:
        super().setup()
        self.front = nn.Parameter(torch.ones(1, DIM, self.reach))

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        return self.conv1d(torch.cat([self.front, x], -1), layer)


class OwnTaps(Convolved):
    """The kernel is computed from the tokens."""

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        taps = self.taps[layer] * x.mean()
        return F.conv1d(x, taps, padding=self.reach, groups=DIM)[..., : x.shape[2]]


class Uncut(Convolved):
    """The end of what was padded is read too."""

    def convolved(self, x: Tensor, layer: int) -> Tensor:
        y = self.conv1d(x, layer, padding=self.reach)
        return y[..., : x.shape[2]] + y[..., -1:]


class OverChannels(Convolved):
    """The tokens stand where channels do."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        weight = self.taps[layer][:1, :, :3]  # [1, 1, 3]
        x = x + F.conv1d(x.reshape(-1, 1, DIM), weight, padding=1).reshape(1, -1, DIM)
        return super(Convolved, self).block(x, layer)


@pytest.mark.family
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Strided, "stride 2"),
        (Circular, None),
        (Ones, "mixes tokens"),
        (Learned, None),
        (OwnTaps, None),
        (Uncut, "mixes tokens"),
    ],
)
def test_another_form_is_refused(kind: type[Convolved], reason: str | None) -> None:
    with pytest.raises(Unsupported, match=reason):
        treespec.tree_program(kind(), options=EAGER)


def test_one_over_features_keeps_no_state() -> None:
    model = OverChannels()
    program: Any = treespec.tree_program(model, options=EAGER)
    assert not program.states
    assert_decodes(model, program, VOCAB, rounds=2)
