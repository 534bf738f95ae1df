"""What commands say of a mesh: the placements of `explain`, the page of `coverage`, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from treespec_compiler.cli import generate, ranks
from treespec_compiler.cli.coverage.check import Result
from treespec_compiler.cli.coverage.plans import against_plan
from treespec_compiler.cli.coverage.report import mesh_page
from treespec_compiler.cli.main import main
from treespec_compiler.errors import RankLost


@pytest.mark.slow
@pytest.mark.rare
def test_explain_says_where_weights_lie(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "hf:gpt2", "--random-weights", "--tiny", "--mesh", "tp=2"]
    assert main([*arguments, "--json"]) == 0
    cut = json.loads(capsys.readouterr().out)["cut"]
    assert cut["ranks"] == 2 and [c["kind"] for c in cut["collectives"]].count("all_reduce") == 4
    found = {weight["names"][0]: weight for weight in cut["weights"]}
    fused = found["transformer.h.0.attn.c_attn.weight"]
    assert fused["placement"].count("+") == 2 and fused["whole_bytes"] == 2 * fused["bytes"]


@pytest.mark.rare
@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["pp=2", "tp=2,pp=2"])
def test_explain_says_which_layers_lie_where(capsys: pytest.CaptureFixture[str], mesh: str) -> None:
    arguments = ["explain", "hf:gpt2", "--random-weights", "--tiny", "--mesh", mesh]
    assert main([*arguments, "--json"]) == 0
    first, last = json.loads(capsys.readouterr().out)["stages"]
    assert [first["stage"]["start"], first["stage"]["stop"], last["stage"]["stop"]] == [0, 1, 2]
    assert last["stage"]["ranks"][0] == 0 and first["stage"]["hands_on"] > 0 == last["stage"]["hands_on"]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"({mesh}; stage 0 of 2, rank" in shown and "handed to the next stage" in shown


def test_a_page_of_cut_types() -> None:
    counts = {"column": 5, "row": 4, "whole": 0, "all_reduce": 4, "all_gather": 1, "whole_sites": 0, "share": 0.54}
    results = [
        Result("llama", "A", "exact", 1e-6, sites=2, cut=counts),
        Result("odd", "A", "refused", reason="nothing can be cut"),
    ]
    page = mesh_page(results, ["gpt2"], "tp=2")
    assert "| llama | exact | 5 | 4 | 0 | 2 of 2 | 4 | 1 | 0.54 |  | 1.0e-06 |  |" in page
    assert "nothing can be cut" in page and "Not run (1): gpt2." in page
    assert "2 types: 1 exact, 1 refused; with attention that stays whole: 0; with a plan" in page


def test_plans_of_transformers_are_held_against_what_was_found() -> None:
    model = nn.Module()
    assert against_plan(model, {"head.weight": "column"}) is None
    model.tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "head": "replicate", "table": "odd"}  # type: ignore[assignment]
    products = {
        f"layers.{i}.{name}.weight": kind for i in range(2) for name, kind in (("up", "column"), ("down", "whole"))
    }
    found = against_plan(model, {**products, "head.weight": "whole", "gate": "whole"})
    assert found is not None and (found.agree, found.beside) == (2, 1)
    assert [str(each) for each in found.differ] == ["`layers.*.down` rowwise, here whole"]
    counts = {"plan": {"agree": 2, "differ": [str(found.differ[0])]}, "whole_sites": 0}
    page = mesh_page([Result("llama", "A", "exact", 1e-6, sites=2, cut=counts)], [], "tp=2")
    assert "| 2 alike; `layers.*.down` rowwise, here whole |" in page
    assert "with a plan of transformers' own: 1, alike in 0." in page


def test_a_lost_rank_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lost(arguments: Namespace) -> int:
        raise RankLost(rank=0, size=2, step=5)

    monkeypatch.setattr(generate, "run", lost)
    assert main(["generate", "--target", "demo", "--prompt", "x"]) == 3
    assert "A rank was lost" in capsys.readouterr().err


def test_a_signal_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*_: object) -> Callable[..., None]:
        raise SignalException("ended", signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", signalled)
    assert ranks.start_ranks(2) == 128 + signal.SIGTERM
    assert ranks.start_ranks(2, stopped=0) == 0


@pytest.mark.parametrize(
    ("ended", "code"), [([2, -15], 2), ([-9, -15], 3), ([-15, -15], 3), ([3, -15], 3), ([1, 2], 2)]
)
def test_the_exit_code_is_of_the_rank_that_ended_by_itself(
    monkeypatch: pytest.MonkeyPatch, ended: list[int], code: int
) -> None:
    def failed(*_: object) -> Callable[..., None]:
        raise ChildFailedError("x", {rank: ProcessFailure(rank, 1, exit, "") for rank, exit in enumerate(ended)})

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", failed)
    assert ranks.start_ranks(2) == code


def test_generate_starts_the_ranks_of_its_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    started: list[int] = []
    monkeypatch.setattr(generate, "start_ranks", lambda count: started.append(count) or 0)
    assert main(["generate", "--target", "demo", "--prompt", "x", "--mesh", "tp=3"]) == 0
    assert started == [3] and not ranks.is_rank()


@pytest.mark.dist
@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_a_mesh_says_what_one_process_says_and_once(pair: SimpleNamespace, mesh: str) -> None:
    command = [sys.executable, "-m", "treespec_compiler", "generate", "--target", pair.target]
    command += ["--prompt-ids", "5,9,2", "--max-new-tokens", "6", "--ignore-eos", "--option", "lowering=eager"]
    runs = [subprocess.run([*command, *more], capture_output=True, text=True) for more in ([], ["--mesh", mesh])]
    alone, cut = runs
    assert cut.returncode == alone.returncode == 0, cut.stderr
    assert cut.stdout == alone.stdout != ""
    assert cut.stderr.count("tokens in") == alone.stderr.count("tokens in") == 1


@pytest.mark.dist
@pytest.mark.rare
@pytest.mark.slow
def test_ranks_that_torchrun_started(pair: SimpleNamespace) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = ["-m", "treespec_compiler", "generate", "--target", pair.target, "--prompt-ids", "5,9,2"]
    command += ["--max-new-tokens", "6", "--ignore-eos", "--option", "lowering=eager"]
    cut = [*torchrun, "--rdzv-endpoint", "localhost:0", *command, "--mesh", "tp=2"]
    together, alone = (subprocess.run(run, capture_output=True, text=True) for run in (cut, [sys.executable, *command]))
    assert together.returncode == alone.returncode == 0, together.stderr
    assert together.stdout == alone.stdout != ""
