"""One record a backend: what is read from it where the device decides."""

from __future__ import annotations

import pytest
import torch

from treespec_compiler.ir.device import CPU, CUDA, profile
from treespec_compiler.program.cuda_graphs import obstacle
from treespec_compiler.program.lowering import _settings


def test_a_device_has_the_record_of_its_backend():
    assert profile("cpu") is profile(torch.device("cpu")) is CPU
    assert profile(torch.device("cuda", 3)) is CUDA
    assert (CPU.prompt_chunk, CUDA.prompt_chunk) == (256, 2048)


def test_an_unknown_device_waits_and_records_nothing():
    other = profile("xpu")
    assert other.kind == "xpu" and other.describe(torch.device("xpu")).startswith("xpu, ")
    assert not (other.synchronous or other.host_memory or other.records or other.pinned_copies)


@pytest.mark.parametrize("device", ["cpu", "xpu", "cuda"])
def test_calls_are_recorded_where_the_record_says_so(device):
    expected = "" if profile(device).records else f"the model is on {device}"
    assert obstacle(torch.fx.Graph(), torch.device(device)) == expected


def test_inductor_s_settings():
    assert _settings(torch.device("cpu")).items() >= dict(CPU.inductor).items()
    assert "cpp_wrapper" not in _settings(torch.device("cuda"))


def test_what_only_one_backend_has():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 2)
    assert torch.float32 in CPU.packs and not CUDA.packs and not profile("xpu").packs
    assert CPU.number(cpu) == -1 and CUDA.number(cuda) == 2  # a device without an index is asked for its own
    assert CPU.capability(cpu) == profile("xpu").capability(torch.device("xpu")) == 0
    assert CPU.free_bytes(cpu) > 0 == profile("mps").free_bytes(torch.device("mps"))
