"""Variants of transformers' decoders that a switch in the configuration turns on: the path oracle for each."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from oracles import EAGER, assert_decodes

import treespec_compiler as treespec
from treespec_compiler import Unsupported
from treespec_compiler.cli.coverage.check import LONG, Result, check_model
from treespec_compiler.cli.coverage.models import VARIANTS, VOCAB, _rope, tiny_model

CASES = [(kind, name) for kind, variants in VARIANTS.items() for name in variants]


@pytest.mark.family
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda word: word.replace(" ", "-"))
def test_variant(kind: str, name: str) -> None:
    fields = VARIANTS[kind][name]
    model = tiny_model(kind, **fields)
    result = Result(kind, "")
    check_model(model, result, prefix=30 if LONG in fields.values() else 7)
    assert result.verdict == "exact", result
    window = fields.get("sliding_window")
    assert any(f"q - k < {window}" in mask for mask in result.masks) == (window is not None)


@pytest.mark.rare
def test_gpt2_upcast_is_what_ran() -> None:
    model = tiny_model("gpt2", **VARIANTS["gpt2"]["upcast and layer scaling"])
    assert model.config._attn_implementation == "eager" and model.config.reorder_and_upcast_attn  # type: ignore
    scales = [s.scale for s in treespec.tree_program(model, options=EAGER).sites]
    assert scales[0] == pytest.approx(2 * scales[1])


@pytest.mark.rare
def test_longrope_ends_with_its_short_regime() -> None:
    """K made with the short factors is not K made with the long ones: the context ends at the switch."""
    model = tiny_model("phi3", **VARIANTS["phi3"]["longrope"])
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == 64
    assert any("above 64 tokens the model takes other values" in limit.reason for limit in program.limits)
    cache = program.new_cache(128)
    program.prefill([1] * 60, cache)
    with pytest.raises(treespec.errors.ContextOverflow, match="64"):
        program.verify(treespec.TokenTree.chain([1, 2, 3, 4, 5]), cache)


@pytest.mark.rare
def test_dynamic_rope_is_refused() -> None:
    model = tiny_model("llama", **_rope("dynamic", factor=2.0))
    with pytest.raises(Unsupported, match="branches on values that are known only when it runs") as caught:
        treespec.tree_program(model, options=EAGER)
    assert "dynamic_frequency_update" in str(caught.value.source)


@pytest.mark.parametrize("fields", [{}, {"multi_query": False, "num_kv_heads": 4}], ids=["mqa", "mha"])
@pytest.mark.family
def test_alibi_that_is_rounded_to_bfloat16(fields: dict[str, object]) -> None:
    """Falcon multiplies slopes and positions in bfloat16: past 256 the bias is no slope times distance any more."""
    model = tiny_model("falcon", alibi=True, **fields)
    program = treespec.tree_program(model, options=EAGER)
    extra = 1 if fields else 4  # a column of K for each query head that shares a key head
    assert {(s.key_dim, s.value_dim, s.bias) for s in program.sites} == {(16 + extra, 16, "")}
    assert_decodes(model, program, VOCAB, rounds=1, prompt=300)
