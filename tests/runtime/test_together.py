"""Real processes on gloo: two ranks generate together, say the same, refuse together, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from treespec_compiler.errors import InvalidOption
from treespec_compiler.mesh import Mesh
from treespec_compiler.program.ranks import joined

pytestmark = [pytest.mark.slow, pytest.mark.dist]

TESTS = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("ranks_worker.py")


def ranks(case: str, folder: Path, count: int = 2, mesh: str = "tp=2") -> list[Any]:
    """What each rank wrote; None of one that wrote nothing."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), str(WORKER), case, str(folder)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        "TREESPEC_PROGRAM_CACHE": "0",
        "MESH": mesh,
    }
    subprocess.run([sys.executable, *command], env=environment, timeout=500, check=False, capture_output=True)
    files = [folder / f"{rank}.json" for rank in range(count)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_ranks_generate_what_one_process_does(tmp_path: Path) -> None:
    first, second = ranks("same", tmp_path)
    for name, (together, alone, reason) in first.items():
        assert together == alone, name
        assert second[name] == [together, alone, reason], name
        assert reason == (None if name == "several" else "length")


@pytest.mark.rare
def test_stages_generate_what_one_process_does(tmp_path: Path) -> None:
    last, first = ranks("stages", tmp_path, mesh="pp=2")
    for name in ("greedy", "sampled"):
        together, alone = last[name]
        assert together == alone and first[name] == last[name], name
    assert last["sites"] == first["sites"] == 1
    assert "embed.weight" in first["weights"] and "embed.weight" not in last["weights"]
    assert "head.weight" in last["weights"] and "head.weight" not in first["weights"]
    assert last["tap"][0] == "InvalidOption" and "other ranks do not have" in last["tap"][1]


@pytest.mark.rare
def test_stages_of_two_ranks_each(tmp_path: Path) -> None:
    found = ranks("same", tmp_path, 4, "tp=2,pp=2")
    assert all(each == found[0] for each in found)
    assert all(together == alone for together, alone, _ in found[0].values())


@pytest.mark.rare
def test_an_engine_runs_on_stages_and_ends_with_one(tmp_path: Path) -> None:
    last, _ = ranks("engine", tmp_path, mesh="pp=2")
    assert last["tokens"] == last["alone"] and last["killed"][0][0] == last["killed"][1] == "RankLost"


@pytest.mark.rare
def test_a_stage_that_is_killed_ends_those_behind_it(tmp_path: Path) -> None:
    last, middle, first = ranks("killed", tmp_path, 3, "pp=3")
    assert first is None
    assert last["error"] == middle["error"] == "RankLost"
    assert last["code"] == middle["code"] == 3


@pytest.mark.rare
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_programs_run_on_every_rank_alike(tmp_path: Path, mesh: str) -> None:
    first, second = ranks("program", tmp_path, mesh=mesh)
    assert first == second and set(first) == {"eager", "inductor"}
    assert max(first.values()) < 1e-4


@pytest.mark.rare
def test_what_does_not_fit_together_is_refused_everywhere(tmp_path: Path) -> None:
    first, second = ranks("refused", tmp_path)
    assert first == second
    assert first["other options"] == [
        "RanksDiffer",
        "Ranks differ: got another max_new_tokens on rank 1 than on rank 0, expected the same on all. Call the same "
        "functions with the same arguments, and load the same weights, on every rank.",
    ]
    assert "input_ids" in first["other prompt"][1] or "prompt" in first["other prompt"][1]
    assert first["mesh of three"][0] == "InvalidOption" and "3 processes" in first["mesh of three"][1]
    assert first["own graph"][0] == "InvalidOption" and "mesh" in first["own graph"][1]
    assert first["other weights"][0] == "RanksDiffer" and "another weights" in first["other weights"][1]
    assert len(first["afterwards"][0]) == 8


@pytest.mark.rare
def test_an_engine_runs_on_all_ranks_and_ends_with_one(tmp_path: Path) -> None:
    first, second = ranks("engine", tmp_path)
    assert first["tokens"] == first["alone"]
    assert [status for status, _ in first["tokens"]] == ["finished", "finished", "failed", "cancelled"]
    assert len(first["by a thread"]) == 5 and first["afterwards"] == second["afterwards"]
    assert first["other sizes"] == second["other sizes"] and "another page_size" in first["other sizes"][1]
    assert "led already" in first["while it is open"][1] and "rank 0 alone" in second["a request"][1]
    assert first["killed"][0][0] == first["killed"][1] == "RankLost"
    assert first["requests"] == ["RankLost"] * 3 and first["later"][0] == "EngineClosed"


BESIDE = 64_000_000
"""Bytes that converting and running any model takes beside its weights: graphs, proofs, activations."""


@pytest.mark.rare
@pytest.mark.parametrize(("mesh", "share"), [("tp=2", 0.51), ("pp=2", 0.61)])
def test_ranks_open_a_folder_and_hold_their_slices(tmp_path: Path, mesh: str, share: float) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "eos_token_id": None}
    config = transformers.LlamaConfig(vocab_size=256, num_hidden_layers=5, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "large")
    small = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, hidden_size=32, intermediate_size=16)
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    first, second = ranks("loaded", tmp_path, mesh=mesh)
    expected = model.generate(torch.tensor([[1, 2, 3, 1, 2, 3]]), max_new_tokens=6, do_sample=False)
    assert first["ids"] == second["ids"] == expected.tolist()
    whole, largest = 4 * sum(p.numel() for p in model.parameters()), 4 * 2 * 2816 * 1024
    for each in (first, second):
        assert each["held"] < share * whole
        assert each["peak"] < each["held"] + largest + BESIDE < whole, each
    assert first["other files"] == second["other files"] and "another files of weights" in first["other files"][1]
    assert first["no files"][0] == "RankFailed" and "no such folder" in first["no files"][1]
    assert second["no files"][0] == "UnreadableModel"


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    first, second = ranks("killed", tmp_path)
    assert second is None
    assert first["error"] == "RankLost" and first["code"] == 3
    assert "rank 0 of 2 after" in first["text"]


# Rank, what it is about to do, and for the how manyeth time.
MOMENTS = (
    "1:heard:1",  # that there is a cache
    "1:call:1",  # the prompt
    "1:call:3",  # a tree
    "1:heard:4",
    "1:heard:7",
    "0:told:1",
    "0:told:2",
    "0:call:1",
    "0:call:3",
    "0:told:6",
)


@pytest.mark.rare
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_may_be_killed_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, mesh: str
) -> None:
    monkeypatch.setenv("KILL", moment)
    found = ranks("killed at", tmp_path, mesh=mesh)
    gone = int(moment[0])
    assert found[gone] is None and found[1 - gone] == {"error": "RankLost", "code": 3}


def test_a_mesh_without_processes_says_how_to_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InvalidOption, match=r"got 'tp=2 in one process', expected 2 processes\. .*torchrun"):
        joined(Mesh(tp=2))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InvalidOption, match="got 'tp=2 in 4 processes'"):
        joined(Mesh(tp=2))
