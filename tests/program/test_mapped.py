"""Memory: a compiled folder's weights are there once, mapped; what converting took is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.capture.call import call_spec
from treespec_compiler.options import Options
from treespec_compiler.pipeline import convert
from treespec_compiler.program.folder.manifest import WEIGHTS
from treespec_compiler.program.folder.written import Extras, write_folder
from treespec_compiler.program.memory import Memory
from treespec_compiler.program.tree_program import TreeProgram
from treespec_compiler.runtime.stats import Stats

EAGER = Options(lowering="eager")
PROCESS = """
import json, sys
import torch, treespec_compiler as treespec
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

def say(program):
    return treespec.generate(program, torch.tensor([[1, 2, 3]]), max_new_tokens=4)

say(treespec.load_program(sys.argv[1]))  # a small one, whose imports and tables are there from then on
before = anonymous()
programs = [treespec.load_program(sys.argv[2]) for _ in range(2)]
stats = [say(program).stats for program in programs][0]
print(json.dumps({"grown": anonymous() - before, "mapped": programs[0].memory.model, **stats.as_dict()}))
"""


class Bag(nn.Module):
    """Attention over an embedding, and a head: nearly all of it is two tables."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(vocab, 512), nn.Linear(512, 1536), nn.Linear(512, vocab)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 8, 64).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(2))


def compiled(where: Path, vocab: int) -> TreeProgram:
    torch.manual_seed(0)
    model = Bag(vocab).eval()
    call = call_spec(model)
    converted = convert(model, call, EAGER)
    program = TreeProgram(model, call, EAGER, converted)
    program.check()
    write_folder(where, program, model, call, converted, Extras())
    assert program.memory.model == sum(4 * p.numel() for p in model.parameters())
    return program


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="no /proc")
@pytest.mark.rare
def test_a_loaded_folder_keeps_one_mapped_copy(tmp_path: Path) -> None:
    made = compiled(tmp_path / "large", 24_000)
    assert made.memory.peak > made.memory.model + made.memory.packed > 100 << 20
    compiled(tmp_path / "small", 96)
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    weights = (tmp_path / "large" / WEIGHTS).stat().st_size
    assert found["packed_bytes"] == 0 and found["mapped"] == pytest.approx(weights, rel=0.01)
    assert found["peak_bytes"] > weights  # the pages that were read are resident, and not its own
    assert found["grown"] < weights / 4, found


def test_stats_tell_it() -> None:
    ids, model = torch.tensor([[1, 2, 3]]), Bag(96).eval()
    stats = treespec.generate(model, ids, max_new_tokens=4, options={"lowering": "eager"}).stats
    assert stats.model_bytes == sum(4 * p.numel() for p in model.parameters())
    assert stats.peak_bytes > stats.model_bytes and "MB at most" in str(stats)
    plain = Stats()
    assert (plain.peak_bytes, plain.model_bytes, plain.packed_bytes) == (0, 0, 0) and "MB" not in str(plain)
    assert Memory() == Memory(0, 0, 0)
