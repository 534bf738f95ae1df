"""Programs saved by one process and found by another: taken where everything that a proof read is the same, never
where anything differs, and given up where they turn out to be wrong.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_home import LOGGER, TEXTS, VOCAB, Home
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler import pipeline
from treespec_compiler.capture.python_state import PythonState, Undigested
from treespec_compiler.errors import InvalidOption, Unsupported
from treespec_compiler.ir import ops, registry
from treespec_compiler.options import Options
from treespec_compiler.program import machine, made
from treespec_compiler.program.saved import programs
from treespec_compiler.program.tree_program import TreeProgram


def rows(program: TreeProgram) -> Tensor:
    cache = program.new_cache(64)
    program.prefill([1, 2, 3, 4, 5], cache)
    return program.verify(treespec.TokenTree([5, 6, 7, 8], [-1, 0, 0, 1]), cache).clone()


def test_the_second_one_is_found(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved.program(saved.model())
    cold = saved.program(saved.model(), program_cache=False)
    monkeypatch.setattr(pipeline, "convert", None)
    found = saved.right(saved.model())
    assert found.from_cache and first.from_cache and not cold.from_cache
    assert torch.equal(rows(found), rows(cold))
    for name in ("sites", "limits", "max_context", "input_vocab", "vocab_size", "dtype"):
        assert getattr(found, name) == getattr(cold, name), name
    assert [r.name for r in found.history] == [r.name for r in cold.history]
    assert found.graph_module.code == cold.graph_module.code
    assert found.comparison is not None and cold.comparison is not None
    assert 33 < found.comparison.tokens < cold.comparison.tokens and found.comparison.rows == cold.comparison.rows


@pytest.mark.rare
def test_stats_say_where_the_program_came_from(saved: Home) -> None:
    options = {"lowering": "eager", "program_cache": str(saved.programs)}
    ids = torch.tensor([[1, 2, 3]])
    found, cold = (
        treespec.generate(saved.model(), ids, max_new_tokens=8, options=each)
        for each in (options, options | {"program_cache": False})
    )
    assert found.stats.program_from_cache and not cold.stats.program_from_cache
    assert found.stats.as_dict()["program_from_cache"]
    assert torch.equal(found.sequences, cold.sequences)


def test_copying_a_model_makes_no_other_program_of_it(saved: Home) -> None:
    model = saved.model()
    copied = copy.deepcopy(model)
    assert saved.program(model).from_cache and saved.program(copied).from_cache


def test_single_lengths_are_looked_at_again_for_other_weights_alone(
    saved: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(made, "lengths_check", lambda *given: looked.append(given))
    assert saved.program(saved.model()).from_cache and not looked
    assert saved.program(saved.model(seed=1)).from_cache and len(looked) == 1


def test_other_weights_are_no_other_program(saved: Home) -> None:
    assert saved.right(saved.model(seed=1)).from_cache


@pytest.mark.family
@pytest.mark.parametrize("name", TEXTS)
def test_other_code_is_another_program(saved: Home, name: str) -> None:
    assert not saved.right(saved.model(TEXTS[name])).from_cache


def hooked(model: Any) -> None:
    model.layers[0].register_forward_hook(lambda module, args, output: output * 0.5)


def hooked_before(model: Any) -> None:
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Adapter(nn.Module):
    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.of, self.more = of, nn.Linear(of.in_features, of.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x) + self.more(x)


def adapted(model: Any) -> None:
    model.layers[0].up = Adapter(model.layers[0].up)


def replaced(model: Any) -> None:
    model.layers[0].forward = lambda x: x * 1.5


def scaled(model: Any) -> None:
    model.config.scale = 0.25


def tied(model: Any) -> None:
    model.head.weight = model.embed.weight


def fewer(model: Any) -> None:
    del model.layers[0]


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].up)


def doubled(model: Any) -> None:
    model.double()


def other_norm(model: Any) -> None:
    model.layers[0].norm.eps = 0.1


CHANGES = (hooked, hooked_before, adapted, replaced, scaled, tied, fewer, parametrized, doubled, other_norm)


@pytest.mark.family
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_state_is_another_program(saved: Home, change: Callable[[Any], None]) -> None:
    model = saved.model()
    change(model)
    assert not saved.right(model).from_cache


@pytest.mark.parametrize("change", [adapted, scaled], ids=lambda change: change.__name__)
@pytest.mark.family
def test_a_found_program_is_followed_through_changes(saved: Home, change: Callable[[Any], None]) -> None:
    model = saved.model()
    assert saved.right(model).from_cache
    change(model)
    assert not saved.right(model).from_cache


def test_weights_of_a_found_program_are_followed(saved: Home) -> None:
    model = saved.model()
    assert saved.right(model).from_cache
    with torch.no_grad():
        model.head.weight.mul_(-1)
        model.layers[0].up.weight.data.add_(0.1)
    assert saved.right(model).from_cache


@pytest.mark.rare
def test_a_function_that_was_replaced_is_another_program(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: plain(x) * 2)
    with pytest.raises(Unsupported, match="other logits"):  # as it is converted: a trace takes torch's own function
        saved.right(saved.model())


@pytest.mark.rare
def test_a_method_of_torch_that_was_replaced_is_another_program(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 2)
    assert not saved.right(saved.model()).from_cache


@pytest.mark.rare
def test_a_hook_on_every_module_is_another_program(saved: Home) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.LayerNorm) else None
    )
    try:
        assert not saved.right(saved.model()).from_cache
    finally:
        handle.remove()


@pytest.mark.rare
def test_options_are_part_of_it(saved: Home) -> None:
    assert not saved.right(saved.model(), max_context=96).from_cache
    assert not saved.right(saved.model(), kernels="aten").from_cache


def test_versions_are_part_of_it(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda *names: {"torch": "0"})
    assert not saved.right(saved.model()).from_cache


@pytest.mark.rare
def test_treespecs_own_source_is_part_of_it(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_own_source", lambda: "another")
    assert not saved.right(saved.model()).from_cache


@pytest.mark.rare
def test_kernels_are_part_of_it(saved: Home) -> None:
    registry.register_kernel(ops.tree_attention, ops.tree_attention, name="mine", priority=1)
    try:
        assert not saved.right(saved.model()).from_cache
    finally:
        registry.unregister_kernel(ops.tree_attention, "mine")


@pytest.mark.rare
def test_an_example_is_part_of_it(saved: Home) -> None:
    ids = torch.arange(5)[None]
    options = {"lowering": "eager", "program_cache": str(saved.programs)}
    assert not treespec.tree_program(saved.model(), example=ids, options=options).from_cache


@pytest.mark.parametrize(
    "options",
    [{"verify": "off"}, {"pipeline": "default"}, {"verify_each": "semantic"}, {"program_cache": False}],
    ids=str,
)
@pytest.mark.family
@pytest.mark.rare
def test_what_asks_for_a_conversion_gets_one(saved: Home, options: dict[str, Any]) -> None:
    assert not saved.right(saved.model(), **options).from_cache
    assert len(saved.files) == 1


# --- what no other process can know of is not saved


class Unregistered(nn.Module):
    """Its table lies in a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tables = inner, [torch.ones(VOCAB)]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) * self.tables[0]


@pytest.mark.rare
def test_a_tensor_that_no_module_keeps(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        home.right(Unregistered(home.model()).eval())
    assert "is not saved" in caplog.text and not home.files


@pytest.mark.rare
def test_code_that_reads_the_environment(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    asks = 'self.factor * (2 if os.environ.get("TWICE") else 1)'
    with caplog.at_level(logging.INFO, LOGGER):
        home.right(home.model(("TEMPERATURE * self.factor", f"TEMPERATURE * {asks}")))
    assert "environment" in caplog.text and not home.files


def test_an_object_that_cannot_be_looked_into() -> None:
    for value in (memoryview(b"12"), {"a": iter([1])}, [{object()}]):
        with pytest.raises(Undigested, match="model"):
            PythonState({"model": value}, [], [])


# --- the option


@pytest.mark.parametrize("value", ["", 1.5, ["/a"]])
def test_a_wrong_option(value: Any) -> None:
    with pytest.raises(InvalidOption, match="program_cache"):
        Options(program_cache=value)


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("0", False), ("1", True), ("", True), ("/some/folder", "/some/folder")):
        monkeypatch.setenv("TREESPEC_PROGRAM_CACHE", text)
        assert Options.parse(None).saved_where == expected
        assert Options.parse({"program_cache": "/mine"}).saved_where == "/mine"
        assert Options.parse({"program_cache": False}).saved_where is False


def test_programs_are_saved_by_default(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TREESPEC_PROGRAM_CACHE", raising=False)
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    models = [home.model(), home.model(seed=1)]
    found = [treespec.tree_program(model, options={"lowering": "eager"}) for model in models[:1]]
    found[0].check()
    found.append(treespec.tree_program(models[1], options={"lowering": "eager"}))
    assert [each.from_cache for each in found] == [False, True]
    assert len([*(tmp_path / "cache" / "programs").glob("*.program")]) == 1


@pytest.mark.rare
def test_a_home_that_cannot_be_written_to_is_named_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (home.programs.parent / "file").write_text("no folder")
    monkeypatch.delenv("TREESPEC_PROGRAM_CACHE", raising=False)
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(home.programs.parent / "file"))
    with caplog.at_level(logging.WARNING, LOGGER):
        for seed in (0, 1):
            program = treespec.tree_program(home.model(seed=seed), options={"lowering": "eager"})
            program.check()
            assert not program.from_cache
    assert len([r for r in caplog.records if "no program is saved" in r.getMessage()]) == 1


@pytest.mark.rare
def test_large_constants_are_not_saved(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(programs, "LARGEST", -2)
    with caplog.at_level(logging.INFO, LOGGER):
        assert not home.right(home.model()).from_cache
    assert "bytes of folded constants" in caplog.text and not home.files
