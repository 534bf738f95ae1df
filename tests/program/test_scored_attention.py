"""Changed scores and special masks: the op against its reference, and decoders converted from their graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EAGER, assert_decodes, error
from scored_modules import (
    CONTEXT,
    VOCAB,
    Alibi,
    Attention,
    Banded,
    Bucketed,
    Chunked,
    Decoder,
    InterleavedRope,
    Sinks,
    Softcapped,
    built,
)
from torch import Tensor, nn
from tree_cases import attention_inputs

from treespec_compiler import TokenTree, tree_program
from treespec_compiler.errors import Unsupported
from treespec_compiler.ir import ops
from treespec_compiler.ir.specs import AttentionSpec, MaskSpec
from treespec_compiler.program.batch import Part, pack
from treespec_compiler.program.cache import TreeCache


@pytest.mark.family
@pytest.mark.parametrize(
    ("attention", "formula", "bias", "softcap", "sinks", "context"),
    [
        (Attention, "k <= q", "", 0.0, False, None),
        (Alibi, "k <= q", "slope_h * (k - q)", 0.0, False, None),
        (Banded, "k <= q and q - k < 5", "", 0.0, False, None),
        (Chunked, "k <= q and floor(q / 6) == floor(k / 6)", "", 0.0, False, None),
        (Softcapped, "k <= q", "", 4.0, False, CONTEXT),
        (Sinks, "k <= q", "", 0.0, True, None),
        (Bucketed, "k <= q", "bias_h[q - k]", 0.0, False, 2048),
    ],
)
def test_decoders_with_their_own_attention(
    attention: Any, formula: str, bias: str, softcap: float, sinks: bool, context: int | None
) -> None:
    model = built(attention)
    program = tree_program(model, options=EAGER)
    for site in program.sites:
        assert (site.mask.formula, site.bias, site.softcap, site.sinks) == (formula, bias, softcap, sinks)
    assert program.max_context == context
    assert_decodes(model, program, VOCAB)


def test_parallel_blocks() -> None:
    model = built(Attention, parallel=True)
    assert_decodes(model, tree_program(model, options=EAGER), VOCAB)


def test_positional_position_ids() -> None:
    torch.manual_seed(0)
    model = InterleavedRope().eval()
    example = (torch.zeros(1, 9, dtype=torch.int64), torch.arange(9)[None])
    program = tree_program(model, example=example, roles={"position_ids": "positions"}, options=EAGER)
    cache = program.new_cache(max_tokens=40)
    prefix, tree = [3, 1, 4, 1, 5], TokenTree([9, 2, 6, 5], [-1, 0, 0, 2])
    program.prefill(prefix, cache)
    rows = program.verify(tree, cache)
    for node in range(len(tree)):
        ids = torch.tensor([prefix + tree.path_tokens(node)])
        with torch.no_grad():
            expected = model(ids, torch.arange(ids.shape[1])[None])[0, -1]
        assert error(rows[node], expected) <= 1e-4


@pytest.mark.rare
def test_a_relative_bias_follows_its_weight() -> None:
    model = built(Bucketed)
    program = tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=1)
    with torch.no_grad():
        model.attention[0].bias.weight.mul_(-1.5)  # type: ignore[union-attr]
    assert_decodes(model, program, VOCAB, rounds=1)


class ScaledByKey(Attention):
    """A bias per key position that is no function of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.per_key = nn.Parameter(torch.randn(CONTEXT))

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        return super().scores(q, k, t) + self.per_key[:t]


class CappedMask(Attention):
    """The softcap comes after the mask, so it caps the mask as well: hidden keys are not hidden."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        return 5.0 * torch.tanh(super().scores(q, k, t).clamp(min=-1e9) / 5.0)


class SinkKept(Sinks):
    """The sink's column is dropped on the other side: the first key goes, not the sink."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, self.dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 4, self.dim).permute(2, 0, 3, 1, 4)
        w = torch.cat([self.scores(q, k, t), self.sinks.reshape(1, -1, 1, 1).expand(b, -1, t, -1)], -1).softmax(-1)
        return self.out((w[..., 1:] @ v).transpose(1, 2).reshape(b, t, -1))


class TwoSidedAlibi(Alibi):
    """Symmetric |i - j| bias without a mask."""

    def scores(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        i = torch.arange(t)
        return q @ k.transpose(-1, -2) - 0.5 * (i[:, None] - i[None, :]).abs()


@pytest.mark.rare
def test_a_bias_by_the_key_s_place_is_read_there() -> None:
    model = built(ScaledByKey)
    program = tree_program(model, options=EAGER)
    assert_decodes(model, program, VOCAB, rounds=1)
    with torch.no_grad():
        model.attention[0].per_key.mul_(-1.5)  # type: ignore[union-attr, operator]
    assert_decodes(model, program, VOCAB, rounds=1)


@pytest.mark.parametrize("attention", [CappedMask, SinkKept, TwoSidedAlibi])
def test_refused(attention: Any) -> None:
    with pytest.raises(Unsupported) as refusal:
        tree_program(built(attention), options=EAGER)
    assert (refusal.value.source is not None and "scored_modules.py" in refusal.value.source) or __file__ in str(
        refusal.value
    )


def _arguments(heads: int, kv_heads: int, dim: int, nodes: int, prefix: int) -> tuple[list[Tensor], TreeCache]:
    spec = AttentionSpec(0, "a", "", "", heads, kv_heads, dim, dim, 0.3, MaskSpec(), torch.float32)
    cache = TreeCache([spec], 64, 2, torch.device("cpu"), ops.commit_path)
    generator = torch.Generator().manual_seed(1)
    for pool in cache.pools:
        pool.normal_(generator=generator)
    cache._lengths[:] = [prefix, prefix + 3]
    trees = [TokenTree([0] * nodes, [-1, *(max(0, i - 2) for i in range(nodes - 1))]) for _ in range(2)]
    batch = pack([Part(0, trees[0]), Part(1, trees[1])], cache, torch.device("cpu"))
    rows = len(batch.meta.positions)
    q, k, v = (torch.randn(1, rows, h, dim, generator=generator).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    return [q, k, v, *cache.pools, *attention_inputs(batch.meta)], cache


@pytest.mark.parametrize("window,chunk", [(0, 0), (4, 0), (0, 5)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("what", ["none", "slopes", "bias", "sinks"])
def test_aten_equals_the_reference(window: int, chunk: int, softcap: float, what: str) -> None:
    import treespec_compiler.codegen  # noqa: F401

    arguments, _ = _arguments(4, 2, 8, 9, 11)
    extras = [
        torch.rand(4) if what == "slopes" else None,
        torch.randn(4, 64) if what == "bias" else None,
        torch.randn(4) if what == "sinks" else None,
    ]
    rest = (0.3, window, chunk, softcap, *extras)
    expected = torch.ops.treespec.tree_attention(*[a.clone() for a in arguments], *rest)
    got = torch.ops.treespec_aten.tree_attention(*[a.clone() for a in arguments], *rest)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()


class ReadsItsInput(Decoder):
    last: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        before, self.last = self.last, self.embed(ids)
        return super().forward(ids) + (0 if before is None else before.mean())


def test_a_forward_pass_that_sets_attributes_and_reads_them_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"another branch|sets attributes"):
        tree_program(ReadsItsInput().eval(), options=EAGER)
