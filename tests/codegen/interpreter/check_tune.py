"""What the tuner checks configurations with finds the kernel right, and a broken one wrong."""

from __future__ import annotations

import pytest
import torch

from treespec_compiler.codegen.gpu import tune_device
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, Config
from treespec_compiler.codegen.gpu.trial import TOLERANCE, Workload, binary_tree
from treespec_compiler.codegen.gpu.tune_device import DeviceBench, Inputs
from treespec_compiler.ir.specs import MaskSpec

CPU = torch.device("cpu")
CONFIG = Config(16, 32, 4, 2)


@pytest.mark.parametrize(
    "changes", [{}, {"mask": MaskSpec(16)}, {"softcap": 8.0, "slopes": True, "bias": True, "sinks": True}], ids=str
)
def test_check(changes, monkeypatch):
    monkeypatch.setattr(tune_device, "CHECKED_CONTEXT", 70)
    spec = AttentionKernel(4, 2, 16, 32, torch.float32, torch.float32, **changes)
    bench = DeviceBench(spec, CPU)
    assert bench.check(CONFIG, Workload(5, 2, 4096)) <= TOLERANCE[torch.float32]
    ((inputs, _),) = bench._expected.values()
    inputs.pool_v[0, 0, 60] += 5
    assert bench.check(CONFIG, Workload(5, 2, 4096)) > 1e-3


def test_inputs():
    spec = AttentionKernel(4, 2, 16, 32, torch.float32, torch.float32)
    inputs = Inputs(spec, Workload(3, 2, 10), CPU)
    assert inputs.bytes == 2 * 13 * 2 * 48 * 4 + 6 * 4 * 48 * 4
    rows, depths = binary_tree(70)
    assert depths[:4] == [0, 1, 1, 2] and depths[69] == 6
    assert rows[3] == [0b1011, 0] and rows[69] == [1 | 1 << 1 | 1 << 3 | 1 << 7 | 1 << 16 | 1 << 34, 1 << 5]
