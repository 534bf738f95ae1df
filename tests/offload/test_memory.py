"""What a process holds in memory while its model's file is larger, and pages that are given back."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from treespec_compiler.offload.paging import mapped_files, page_out

TESTS = Path(__file__).resolve().parents[1]


BESIDE = 64_000_000
"""Bytes that converting and running any model of this kind takes beside its weights: graphs, proofs, activations."""


@pytest.mark.slow
def test_resident_set_stays_below_the_budget(tmp_path: Path) -> None:
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
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    file, budget = (tmp_path / "model" / "model.safetensors").stat().st_size, 240_000_000
    assert file > 1.3 * (budget + BESIDE)
    script = TESTS / "offload" / "larger_than_memory.py"
    command = [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "blobs"), str(budget)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["steps"]) > 1 and max(found["steps"]) < budget + BESIDE, found
    assert found["streamed"] > file / 2 and found["read"] >= found["streamed"] * len(found["steps"])


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
