"""Tree programs as Inductor compiles them for CUDA, without a GPU: what a step launches, and that nothing is copied.

Inductor gets fake tensors of a device that is not there and is stopped once it has written the code around its
kernels. That pretence is global, so it is made in a process of its own: this file, run as a script.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
LAYERS = {"plain llama": 2, "gemma2": 2, "mixtral": 1}

pytestmark = pytest.mark.slow

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using NoOp = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, NoOp)
"""

# ---- the script: {model: [[code], why it cannot be recorded]} of the models named on the command line


class _Written(BaseException):
    """The code is there; it is neither loaded nor run."""


def main(out: str, *names: str) -> None:
    for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks"):
        sys.path.insert(0, str(folder))
    if torch.version.cuda is None:
        register_device_guard()
    Path(out).write_text(json.dumps({name: generated(model(name)) for name in names}))


def register_device_guard() -> None:
    """A torch without CUDA refuses to touch even fake tensors of that device; a guard that does nothing will do."""
    from torch.utils import cpp_extension

    from treespec_compiler.codegen.cpu.build import compiler

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        flags = ["-std=c++20", "-shared", "-fPIC", *includes, *libraries, "-lc10"]
        subprocess.run([compiler(), str(source), "-o", str(library), *flags], check=True, timeout=120)
        ctypes.CDLL(str(library))


def model(name: str) -> torch.nn.Module:
    """A tiny model in bfloat16, on the CPU."""
    if name == "plain llama":
        from gpu_sections import llama

        return llama.make("tiny", torch.device("cpu"), torch.bfloat16)
    from treespec_compiler.cli.coverage.models import tiny_model

    window = {"gemma2": {"window": 4}}.get(name, {})
    return tiny_model(name, num_hidden_layers=LAYERS[name], **window).to(torch.bfloat16)


def generated(module: torch.nn.Module) -> tuple[list[str], str]:
    """The code of each graph that Inductor makes of the model's tree program, and why it cannot be recorded."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    from treespec_compiler.program import cuda_graphs, lowering

    codes: list[str] = []

    def keep(code: str) -> None:
        codes.append(code)
        raise _Written

    program = converted(module)
    move_to_cuda(program.graph_module)
    executor = program._executor
    examples = executor.examples()
    settings = lowering._settings(torch.device("cuda"))
    with (
        pretended_gpu(),
        mock.patch.object(lowering, "_fake", fake_on_cuda(lowering._fake)),
        mock.patch.object(lowering, "_settings", lambda device: settings),
        mock.patch.object(GraphLowering, "save_output_code", keep),
        config.patch(fx_graph_cache=False),
        contextlib.suppress(_Written),
    ):
        obstacle = cuda_graphs.obstacle(program.graph_module.graph, torch.device("cuda", 0))
        lowering.lower_inductor(program.graph_module, executor.roles, examples)
    return codes, obstacle


def converted(module: torch.nn.Module) -> Any:
    """A program on the CPU with the ops and the kernels of CUDA."""
    from treespec_compiler import tree_program
    from treespec_compiler.ir.library import arguments, given
    from treespec_compiler.ir.registry import best_kernel
    from treespec_compiler.passes import bind_kernels, fuse, fuse_rope
    from treespec_compiler.program import made

    def best(op: Any, device: Any, dtype: torch.dtype, **asked: Any) -> Any:
        return best_kernel(op, "cuda", dtype, **asked)

    def best_for(node: torch.fx.Node, **asked: Any) -> Any:
        return best(node.target, None, node.meta["val"].dtype, given=given(node.target, arguments(node)), **asked)

    with (
        mock.patch.object(fuse, "best_kernel", best),
        mock.patch.object(fuse_rope, "best_kernel", best),
        mock.patch.object(bind_kernels, "best_kernel_for", best_for),
        mock.patch.object(made, "lengths_check"),  # it runs the kernels
    ):
        return tree_program(module)


def move_to_cuda(gm: torch.fx.GraphModule) -> None:
    def moved(x: Any) -> Any:
        return torch.device("cuda", 0) if isinstance(x, torch.device) else x

    for node in gm.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), moved)
    gm.recompile()


def fake_on_cuda(fake: Any) -> Any:
    """`lowering._fake` of an example on the CPU, as if it were on the GPU."""

    def made(mode: Any, name: str, tensor: torch.Tensor) -> Any:
        like = fake(mode, name, tensor.to("meta"))
        with mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda:0")

    return made


class Driver:
    """Triton's, of an H100 that is not there."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


PROPERTIES = SimpleNamespace(
    type="cuda", index=0, name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """What Inductor asks a GPU before it writes code for it."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import compile_fx, scheduler
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._subclasses import fake_tensor

    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_properties": PROPERTIES, "get_device_capability": (9, 0), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    worker = CudaInterface.Worker
    places: list[tuple[Any, str, Any]] = [(torch.cuda, name, answer) for name, answer in answers.items()]
    places += [(worker, "get_device_properties", PROPERTIES), (worker, "current_device", 0)]
    places += [(CudaInterface, "get_device_properties", PROPERTIES), (fake_tensor, "init_gpu_context", None)]
    places += [(scheduler, "has_triton", True), (compile_fx, "has_triton", True)]
    # Patterns of training and of whole attention, which Inductor traces with tensors on the device.
    places += [(joint_graph, "lazy_init", None), (post_grad, "lazy_init", None)]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in places:
            stack.enter_context(mock.patch.object(owner, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        yield


# ---- the tests


@dataclass
class Step:
    """The code of a step: `def call(args)`, without comments; and why it cannot be recorded."""

    code: str
    obstacle: str

    @classmethod
    def of(cls, codes: list[str], obstacle: str) -> Step:
        assert len(codes) == 1  # one graph, whatever the sizes
        body = codes[0][codes[0].index("def call(") :].partition("\ndef get_args")[0]
        return cls("\n".join(line for line in body.splitlines() if not line.strip().startswith("#")), obstacle)

    def launches(self) -> Counter[str]:
        """Kernels by kind: products, Inductor's own, and each op that is called as it is."""
        found = re.findall(r"= (torch\.ops\.\w+\.\w+)|(extern_kernels\.\w+)\(|(triton)_\w+\.run\(", self.code)
        return Counter(next(filter(None, names)) for names in found)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    pytest.importorskip("triton", reason="Inductor needs triton to write code for CUDA")
    from treespec_compiler.codegen.cpu.build import BuildError, compiler

    if torch.version.cuda is None:
        try:
            compiler()
        except BuildError as why:
            pytest.skip(f"this torch knows no CUDA, and its guard cannot be built: {why}")
    names = list(LAYERS) if importlib.util.find_spec("transformers") else ["plain llama"]
    out = tmp_path_factory.mktemp("cuda") / "code.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Step.of(*made) for name, made in json.loads(out.read_text()).items()}


def step_of(steps: dict[str, Step], name: str) -> Step:
    return steps[name] if name in steps else pytest.skip("needs transformers")


@pytest.mark.rare
def test_launches_of_a_layer(steps: dict[str, Step]) -> None:
    """Llama: 7 products (q, k, v, o, gate, up, down), attention with its rotation, and 3 fused kernels (two norms with
    the residual sum, silu and product); besides the layers the head's product, the last norm, cos and sin."""
    layers, op = LAYERS["plain llama"], "torch.ops.treespec_triton.tree_attention"
    expected = {"extern_kernels.mm": 7 * layers + 1, op: layers, "triton": 3 * layers + 2}
    assert steps["plain llama"].launches() == expected


@pytest.mark.rare
def test_launches_of_scored_attention(steps: dict[str, Step]) -> None:
    """Gemma 2: four norms a layer, of which those after a product and before the next one share a kernel or two."""
    launches = step_of(steps, "gemma2").launches()
    layers, op = LAYERS["gemma2"], "torch.ops.treespec_triton.tree_attention"
    assert launches.keys() == {"extern_kernels.mm", op, "triton"}
    assert launches["extern_kernels.mm"] == 7 * layers + 1 and launches[op] == layers
    assert launches["triton"] <= 5 * layers + 2


@pytest.mark.rare
def test_experts_are_grouped_products(steps: dict[str, Step]) -> None:
    launches, layers = step_of(steps, "mixtral").launches(), LAYERS["mixtral"]
    assert launches["extern_kernels._grouped_mm"] == 2 * layers  # gate and up together, down
    assert launches["extern_kernels.mm"] == 5 * layers + 1  # q, k, v, o, router; head


MODELS = pytest.mark.parametrize("name", ["plain llama", "gemma2", "mixtral"])


@MODELS
@pytest.mark.rare
def test_pools_and_weights_are_read_where_they_are(steps: dict[str, Step], name: str) -> None:
    step = step_of(steps, name)
    assert not re.search(r"\b(clone|copy_|contiguous|auto_functionalized)\b", step.code)
    for arguments in re.findall(r"treespec_triton\.\w+\.default\((.*)\)", step.code):
        q, k, v, pool_k, pool_v, *_ = re.findall(r"reinterpret_tensor\(buf[^)]*\)[^)]*\)[^)]*\)|\w+", arguments)
        assert all(x.startswith("reinterpret_tensor(buf") for x in (q, k, v))  # views of what the products wrote
        assert re.fullmatch(r"arg\d+_1", pool_k) and re.fullmatch(r"arg\d+_1", pool_v)
    products = re.findall(r"extern_kernels\.mm\((.*), out=", step.code)
    weight = r"reinterpret_tensor\(arg\d+_1, \((\d+), \d+\), \(1, \1\), 0\)$"  # [in, out], column by column: no copy
    assert products and all(re.search(weight, product) for product in products)


@MODELS
@pytest.mark.rare
def test_nothing_waits_for_the_device(steps: dict[str, Step], name: str) -> None:
    waits = r"\.item\(|\.tolist\(|\.cpu\(|nonzero|synchronize|_local_scalar_dense|device='cpu'|empty_strided_cpu"
    step = step_of(steps, name)
    assert not re.search(waits, step.code)
    assert step.obstacle == ""  # so it is recorded as a CUDA graph


if __name__ == "__main__":
    main(*sys.argv[1:])
