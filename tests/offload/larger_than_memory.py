"""Decode a saved model whose file is larger than the budget, and print what the process holds in memory, as JSON.

Arguments: the folder of the model, the folder for its blobs, the budget in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from zoo import make

import treespec_compiler as treespec


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(row for row in rows if row.startswith("VmRSS:")).split()[1])


def main(folder: str, blobs: str, budget: int) -> None:
    torch.set_num_threads(1)
    settings = {"draft": "ngram", "policy": "chain:3", "max_new_tokens": 4}
    treespec.generate(make("llama"), [1, 2, 3], options={"lowering": "eager"}, **settings)  # what any model takes
    before, after = resident(), []
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    offload = {"resident_gb": budget / 1e9, "dir": blobs}
    program = treespec.tree_program(model, options={"lowering": "eager", "offload": offload})
    for step in treespec.stream(program, [1, 2, 3, 1, 2, 3], **settings):
        after.append(resident() - before)
        assert step.tokens
    streamed = program.state.streaming.bytes
    print(json.dumps({"steps": after, "streamed": streamed, "read": program.stream_stats.bytes}))


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
