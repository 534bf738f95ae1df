"""What a process holds in memory while its model's file is larger, and pages that are given back."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from treespec_compiler.offload.paging import mapped_files, page_out

TESTS = Path(__file__).resolve().parents[1]


BESIDE = 64_000_000
"""Bytes that converting and running any model of this kind takes beside its weights: graphs, proofs, activations."""


COMPARED = 2 * 280 * 8 * 2 * 1024 * 4
"""Bytes of keys and values of the two requests by which a program is compared with its model before its first use."""


LARGEST = 2 * 2816 * 1024 * 4
"""Bytes of what is packed at once: two joined matrices of float32."""


def saved(folder: Path, dtype: torch.dtype) -> int:
    """A model of eight layers, written; gives the size of its weights' file in bytes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def ran(script: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(TESTS / "offload" / script), *map(str, arguments)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    # A program that an earlier run saved would be found, and less would be taken.
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TREESPEC_PROGRAM_CACHE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.rare
@pytest.mark.slow
def test_resident_set_stays_below_the_budget(tmp_path: Path) -> None:
    file, budget = saved(tmp_path / "model", torch.float32), 240_000_000
    assert file > 1.3 * (budget + BESIDE)
    found = ran("larger_than_memory.py", tmp_path / "model", tmp_path / "blobs", budget)
    assert len(found["steps"]) > 1 and max(found["steps"]) < budget + BESIDE, found
    assert found["streamed"] > file / 2 and found["read"] >= found["streamed"] * len(found["steps"])


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 120_000_000], ids=["resident", "streamed"])
@pytest.mark.rare
def test_opening_a_model_takes_what_is_made_of_it(budget: int | None, tmp_path: Path) -> None:
    """The file is of bfloat16, which as float32 would take twice its size, and what is packed beside that."""
    file = saved(tmp_path / "model", torch.bfloat16)
    found = ran("opened_in_memory.py", tmp_path / "model", tmp_path / "files", budget or "all")
    assert (found["streamed"] > file / 2) == (budget is not None)
    assert found["peak"] < (budget or found["held"]) + LARGEST + COMPARED + BESIDE < 2 * file, found


def _in_memory(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that the tensor lies in which are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    inside = False
    for line in lines:
        first, dash, rest = line.partition("-")
        if dash and " " in rest and ":" not in first:
            inside = int(first, 16) <= tensor.data_ptr() < int(rest.split()[0], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")


def test_pages_of_mapped_files_are_given_back_and_nothing_is_lost(tmp_path: Path) -> None:
    size = 1 << 22
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * (size // 256))
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    total = int(mapped.sum(dtype=torch.int64))
    mapped[5000] += 1  # of this process alone
    own = torch.ones(size, dtype=torch.uint8)
    before = _in_memory(mapped)
    page_out([mapped, own, mapped[:10]])
    assert _in_memory(mapped) <= 64 * mmap.PAGESIZE < before
    assert int(mapped.sum(dtype=torch.int64)) == total + 1 and int(own.sum(dtype=torch.int64)) == size
    starts, ends = mapped_files()
    assert starts == sorted(starts) and all(a < b for a, b in zip(starts, ends, strict=True))
