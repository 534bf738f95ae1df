"""What commands say of streamed weights, and that `generate` gives the same with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import PROMPT, save_llama

from treespec_compiler.cli import explain
from treespec_compiler.cli.main import main
from treespec_compiler.inspection.offload import OffloadSummary

pytest.importorskip("transformers")
EAGER = ["--option", "lowering=eager"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.rare
def test_what_is_streamed_and_the_same_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "model", layers=4, seed=1)
    model, blobs = f"hf:{tmp_path / 'model'}", tmp_path / "blobs"

    def offload(size: int) -> list[str]:
        return ["--offload", "disk", "--resident-gb", str(size / 1e9), "--offload-dir", str(blobs)]

    assert main(["explain", model, *offload(1000), *EAGER]) == 2
    refusal = capsys.readouterr().err
    assert "room for 1,000 bytes of weights" in refusal
    least = int(refusal.partition("at least ")[2].partition(":")[0].replace(",", ""))
    found = said(capsys, "explain", model, *offload(least), *EAGER)["offload"]
    assert found["streamed_layers"] == found["layers"] == 4 and found["rate"] > 0 and found["seconds"] > 0
    assert found["resident_bytes"] + found["ring_bytes"] <= least
    assert list(blobs.iterdir()) == []  # the sample is gone

    call = ["generate", "--target", model, "--draft", "ngram", "--prompt", PROMPT, "--max-new-tokens", "8"]
    streamed, wanted = said(capsys, *call, *offload(least), *EAGER), said(capsys, *call, *EAGER)
    assert streamed["ids"] == wanted["ids"]
    assert streamed["stats"]["weight_read_bytes"] > 0 and wanted["stats"]["weight_read_bytes"] == 0
    assert len(list(blobs.iterdir())) == 1


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    explain.show_offload(explain.console(), OffloadSummary(30, 20, 10**8, 10**7, 2 * 10**9, "/blobs", 1e9))
    text = capsys.readouterr().out
    assert "the first 10 of 30 layers" in text and "2,000,000,000 bytes of 20 layers" in text
    assert "a step takes at least 2.000 s: 1.00 GB/s from /blobs" in text
    explain.show_offload(explain.console(), OffloadSummary(30, 0, 10**8, 0, 0, "/blobs", 0.0))
    assert "none: all 100,000,000 bytes fit" in capsys.readouterr().out


def test_a_size_without_offload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", "demo", "--prompt", "x", "--resident-gb", "2"]) == 2
    assert "--offload disk" in capsys.readouterr().err
