"""Programs whose weights are streamed: bit by bit what the resident program says, and the model's own rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_decodes, random_tree
from test_narrow_weights import in_blocks
from torch import Tensor, nn
from zoo import VOCAB, make

import treespec_compiler as treespec
from treespec_compiler.codegen import cpu
from treespec_compiler.errors import InvalidOption, WeightsUnreadable
from treespec_compiler.passes.streaming.budget import Budget
from treespec_compiler.passes.streaming.plan import layers, make_plan
from treespec_compiler.program.early_exit import EarlyExitProgram

pytest.importorskip("transformers")


def least(model: nn.Module, slots: int) -> float:
    """10^9 bytes that are just enough."""
    state = treespec.tree_program(model, options={"lowering": "eager"}).state
    found = [layer.bytes for layer in layers(state)]
    everything = make_plan(state, Budget(10**12, slots)).resident
    return (everything - sum(found) + slots * max(found)) / 1e9


def streamed(model: nn.Module, folder: Path, slots: int = 2, lowering: str = "eager") -> treespec.TreeProgram:
    offload = {"resident_gb": least(model, slots), "dir": str(folder), "slots": slots}
    return treespec.tree_program(model, options={"lowering": lowering, "offload": offload})


def said(program: treespec.TreeProgram) -> list[torch.Tensor]:
    cache = program.new_cache(128)
    rows = [program.prefill([i % VOCAB for i in range(3, 30)], cache).clone()]
    for seed in range(2):
        tree = random_tree(9, VOCAB, seed)
        rows.append(program.verify(tree, cache).clone())
        cache.commit(tree.path(8))
    return rows


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make("llama", num_hidden_layers=4)


@pytest.mark.parametrize(("name", "slots"), [("gpt2", 3), pytest.param("falcon", 2, marks=pytest.mark.rare)])
def test_bit_by_bit_what_the_resident_program_says(name: str, slots: int, tmp_path: Path) -> None:
    model = make(name, num_hidden_layers=4)
    program = streamed(model, tmp_path, slots)
    assert len(program.state.streaming.layers) >= 3
    resident = treespec.tree_program(model, options={"lowering": "eager"})
    assert all(map(torch.equal, said(program), said(resident)))
    assert_decodes(model, program, VOCAB, rounds=1)


@pytest.mark.rare
@pytest.mark.family
@pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
@pytest.mark.parametrize(("form", "stored"), [("bfloat16", lambda w: w.bfloat16().float()), ("q4_1", in_blocks)])
def test_files_hold_the_packed_form(form: str, stored: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=4)
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
            parameter.data.copy_(stored(parameter.data))
    program = streamed(model, tmp_path)
    assert any(f"{form})" in str(made) for made in program.state.weights.streamed.values())
    resident = treespec.tree_program(model, options={"lowering": "eager"})
    assert all(map(torch.equal, said(program), said(resident)))


@pytest.mark.rare
def test_compiled(llama: nn.Module, tmp_path: Path) -> None:
    program = streamed(llama, tmp_path, lowering="inductor")
    assert_decodes(llama, program, VOCAB)
    assert program.stream_stats.bytes > 0


@pytest.mark.rare
def test_compiled_for_every_ring(llama: nn.Module, tmp_path: Path) -> None:
    """Bit by bit the same. What is resident is cut elsewhere, and rounds as another compilation does."""
    program = streamed(llama, tmp_path, lowering="inductor")
    rows = said(program)
    assert all(map(torch.equal, rows, said(streamed(llama, tmp_path, slots=3, lowering="inductor"))))
    everything = treespec.tree_program(llama, options={"lowering": "inductor"})
    assert all(torch.allclose(a, b, rtol=0, atol=5e-6) for a, b in zip(rows, said(everything), strict=True))
    assert everything.stream_stats is None


@pytest.mark.rare
def test_generate_with_a_draft(llama: nn.Module, tmp_path: Path) -> None:
    model, draft = llama, make("llama", num_hidden_layers=2)
    offload = {"resident_gb": least(model, 2), "dir": str(tmp_path)}
    settings = {"draft": draft, "policy": "2,1", "max_new_tokens": 20}
    out = treespec.generate(model, [1, 2, 3], options={"lowering": "eager", "offload": offload}, **settings)
    wanted = treespec.generate(model, [1, 2, 3], options={"lowering": "eager"}, **settings)
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert out.stats.weight_read_bytes > 0 and wanted.stats.weight_read_bytes == 0
    engine = treespec.Engine(model, max_requests=2, options={"lowering": "eager", "offload": offload})
    requests = [engine.add([1, 2, 3], max_new_tokens=20) for _ in range(2)]
    engine.run()
    stats = engine.stats
    assert 0 < stats.weight_wait_seconds < stats.target_seconds and stats.draft_seconds > 0
    assert stats.weight_read_bytes > 0 and stats.compute_seconds > 0 and stats.weight_rate > 0
    assert [[[1, 2, 3, *r.output.tokens]] for r in requests] == [wanted.sequences.tolist()] * 2
    engine.close()


@pytest.mark.rare
def test_weights_that_change_are_written_anew(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=4)
    program = streamed(model, tmp_path)
    said(program)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert_decodes(model, program, VOCAB, rounds=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.rare
def test_two_programs_on_one_store(llama: nn.Module, tmp_path: Path) -> None:
    one, two = streamed(llama, tmp_path), streamed(make("llama", num_hidden_layers=4), tmp_path)
    assert all(map(torch.equal, said(one), said(two)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.rare
def test_a_disk_that_fails_ends_the_call_and_no_more(llama: nn.Module, tmp_path: Path) -> None:
    program = streamed(llama, tmp_path)
    rows = said(program)
    blob = next(tmp_path.rglob("layer-0002.bin"))
    blob.rename(blob.with_suffix(".away"))
    cache = program.new_cache(64)
    with pytest.raises(WeightsUnreadable, match="layer-0002"):
        for _ in range(3):
            program.verify(treespec.TokenTree([1], [-1]), cache)
    blob.with_suffix(".away").rename(blob)
    assert all(map(torch.equal, said(program), rows))


@pytest.mark.rare
def test_an_early_exit_stays_in_memory(tmp_path: Path) -> None:
    """Behind streamed layers it holds its own, which are the model's present ones."""
    model = make("llama", num_hidden_layers=4)
    program = streamed(model, tmp_path)
    assert program.state.streaming.layers[0].of_model == 0
    resident = treespec.tree_program(model, options={"lowering": "eager"})
    tree, made = random_tree(9, VOCAB, 0), []
    for layers_kept in (1, 3):
        exits, wanted = EarlyExitProgram(program, layers_kept), EarlyExitProgram(resident, layers_kept)
        assert exits.weight_bytes == wanted.weight_bytes
        assert "fetch" not in exits.graph_module.code
        assert torch.equal(exits.verify(tree, exits.new_cache(64)), wanted.verify(tree, wanted.new_cache(64)))
        made += [(exits, wanted)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    for exits, wanted in made:
        assert torch.equal(exits.verify(tree, exits.new_cache(64)), wanted.verify(tree, wanted.new_cache(64)))
    assert all(map(torch.equal, said(program), said(resident)))


def test_a_mesh_is_refused() -> None:
    with pytest.raises(InvalidOption, match="mesh='tp=2'"):
        treespec.Options.parse({"offload": "disk", "mesh": "tp=2"})


@pytest.mark.parametrize(
    "offload",
    [
        "gpu",
        {"to": "cpu"},
        {"resident_gb": -1},
        {"resident_gb": "2"},
        {"slots": 1},
        {"slots": True},
        {"ram_gb": True},
        {"size": 3},
        7,
    ],
)
def test_options_that_mean_nothing(offload: Any) -> None:
    with pytest.raises(InvalidOption, match="offload"):
        treespec.Options.parse({"offload": offload})
