"""Experts run one after the other on rows split by count: one grouped matmul where that is proved, or refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from modules import DIM, VOCAB, Tiny
from oracles import EAGER, assert_decodes
from pass_cases import applied, only
from torch import Tensor, fx, nn
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler.codegen.gpu import grouped_linear as gpu
from treespec_compiler.ir.grouped_linear import every_group, grouped_linear
from treespec_compiler.ir.registry import best_kernel, kernel_of
from treespec_compiler.passes import bind_kernels, normalize
from treespec_compiler.program.cuda_graphs import obstacle

EXPERTS, CHOICES = 4, 2


class Split(Tiny):
    """Two of four experts a token: rows sorted by expert, split by how many each got, and added up again."""

    layers = 1

    def setup(self) -> None:
        self.router, self.other = nn.Linear(DIM, EXPERTS), nn.Linear(DIM, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * DIM, DIM) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * 0.3)

    def block(self, x: Tensor, layer: int) -> Tensor:
        x = super().block(x, layer)
        return x + self.mixture(x[0])[None]

    def mixture(self, x: Tensor) -> Tensor:
        logits, ids = self.router(x).topk(CHOICES, dim=1)
        counts = self.counts(x, ids)
        order = self.order(ids.flatten())
        of = order.div(CHOICES, rounding_mode="trunc")
        gates = logits.softmax(1).flatten()[order]
        a, b = self.experts(x[of], self.up, counts).chunk(2, dim=-1)
        y = self.experts(torch.relu(a) * b, self.down, counts) * gates[:, None]
        return torch.zeros_like(x).index_add(0, of, y)

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        marks = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, 1)
        return marks.long().sum(0).tolist()

    def order(self, ids: Tensor) -> Tensor:
        return ids.sort(0)[1]

    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[i]) for i in range(EXPERTS)], dim=0)


class Unsorted(Split):
    def order(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids).sort(0, stable=True)[1]


class Descending(Split):
    def order(self, ids: Tensor) -> Tensor:
        return ids.sort(0, descending=True)[1]


class OthersCounts(Split):
    """The counts of another router's choices."""

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        return super().counts(x, self.other(x).topk(CHOICES, dim=1)[1])


class SwappedMatrices(Split):
    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[EXPERTS - 1 - i]) for i in range(EXPERTS)], dim=0)


class SwappedParts(Split):
    def experts(self, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts, dim=0)
        return torch.cat([nn.functional.linear(parts[i], weight[i]) for i in reversed(range(EXPERTS))], dim=0)


class CountedTwice(Split):
    """Marks of ids that may repeat within a token count less than the rows there are."""

    def counts(self, x: Tensor, ids: Tensor) -> list[int]:
        return super().counts(x, ids // 2)


def build(cls: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls()).eval()


def test_exact() -> None:
    model = build(Split)
    assert_decodes(model, treespec.tree_program(model, options=EAGER), VOCAB, rounds=2)


@pytest.mark.family
@pytest.mark.parametrize("cls", [Unsorted, Descending, OthersCounts, SwappedMatrices, SwappedParts, CountedTwice])
def test_refused(cls: type[Tiny]) -> None:
    with pytest.raises(treespec.Unsupported) as refusal:
        treespec.tree_program(build(cls), options=EAGER)
    assert refusal.value.source is not None and "test_grouped_experts.py" in refusal.value.source


def test_one_matmul_for_all_experts() -> None:
    """Before: a split, a linear for each expert, and a cat. After: one grouped linear, and no size of run time."""
    parts = ("aten.split_with_sizes", "aten.item", "aten.histc", "treespec.grouped_linear")
    old, new, _, state = applied(build(Split), normalize.PASS)
    assert only(old, *parts) == ["aten.item"] * EXPERTS + ["aten.split_with_sizes"] * 2
    assert only(new, *parts) == ["aten.histc"] + ["treespec.grouped_linear"] * 2
    sizes = {str(s) for n in state.graph.nodes if isinstance(n.meta.get("val"), Tensor) for s in n.meta["val"].shape}
    assert not any(s.startswith("u") for s in sizes)


@pytest.mark.rare
def test_matrices_in_another_order_are_left_alone() -> None:
    _, new, _, _ = applied(build(SwappedMatrices), normalize.PASS)
    assert "treespec.grouped_linear" not in new


ENDS = [[3, 3, 5, 9], [0, 0, 0, 9], [9, 9, 9, 9], [2, 4, 7, 9]]
OPS = [grouped_linear, gpu.GROUPED_LINEAR]


@pytest.mark.parametrize("ends", ENDS)
def test_every_way_of_the_op(ends: list[int]) -> None:
    x, weight = torch.randn(9, 5), torch.randn(4, 6, 5)
    group = [next(e for e, end in enumerate(ends) if r < end) for r in range(9)]
    expected = torch.stack([weight[g] @ row for g, row in zip(group, x, strict=True)])
    for way in (grouped_linear, every_group, gpu.grouped_linear):
        torch.testing.assert_close(way(x, weight, torch.tensor(ends)), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_op_is_traceable(op: Any) -> None:
    arguments = (torch.randn(9, 5), torch.randn(4, 6, 5), torch.tensor([3, 3, 5, 9]))
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def grouped_products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Torch's grouped product counts as available here; the offsets it was called with."""
    calls: list[Tensor] = []
    multiply = torch._grouped_mm

    def counted(x: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(offs)
        return multiply(x, matrices, offs=offs)

    monkeypatch.setattr(gpu, "has_kernel", lambda device: True)
    monkeypatch.setattr(torch, "_grouped_mm", counted)
    return calls


def close(found: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> None:
    """`found` is what the reference gives in float64, up to two roundings; nothing is left unwritten."""
    expected = grouped_linear(x.double(), weight.double(), ends)
    assert found.dtype == x.dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-2)


class TestTorchsGroupedProduct:
    """The CPU has it too, with the same demands on strides; it waits for nothing there."""

    @pytest.mark.parametrize("ends", [*ENDS, "random"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_equals_the_reference(self, grouped_products: list[Tensor], ends: Any, dtype: torch.dtype) -> None:
        for seed in range(5):
            torch.manual_seed(seed)
            where = torch.randint(0, 10, (4,)).sort()[0] if ends == "random" else torch.tensor(ends)
            where[-1] = 9
            x, weight = torch.randn(9, 16).to(dtype), torch.randn(4, 12, 16).to(dtype)
            close(gpu.GROUPED_LINEAR(x, weight, where), x, weight, where)
        assert len(grouped_products) == (5 if dtype == torch.bfloat16 else 0)
        assert all(offs.dtype == torch.int32 for offs in grouped_products)

    def test_one_group_and_one_row(self, grouped_products: list[Tensor]) -> None:
        for rows, groups in ((9, 1), (1, 4), (1, 1)):
            x, weight = torch.randn(rows, 16).bfloat16(), torch.randn(groups, 8, 16).bfloat16()
            ends = torch.full((groups,), rows)
            close(gpu.GROUPED_LINEAR(x, weight, ends), x, weight, ends)
        assert len(grouped_products) == 3

    def test_rows_of_any_layout(self, grouped_products: list[Tensor]) -> None:
        weight, ends = torch.randn(2, 5, 16).bfloat16(), torch.tensor([3, 9])
        wide = torch.randn(9, 40).bfloat16()
        layouts = [wide[:, 8:24], wide[:, 3:19], torch.randn(16, 9).bfloat16().t(), torch.randn(1, 16).bfloat16()]
        layouts += [torch.randn(16).bfloat16().as_strided((1, 16), (1, 1)), wide[:, :32:2]]
        for x in layouts:
            close(gpu.GROUPED_LINEAR(x, weight, ends.clamp(max=len(x))), x, weight, ends.clamp(max=len(x)))
        assert len(grouped_products) == len(layouts)

    def test_matrices_of_either_layout(self, grouped_products: list[Tensor]) -> None:
        x, ends = torch.randn(9, 16).bfloat16(), torch.tensor([3, 9])
        for weight in (torch.randn(2, 16, 24).bfloat16().mT, torch.randn(1, 24, 16).bfloat16().expand(2, 24, 16)):
            close(gpu.GROUPED_LINEAR(x, weight, ends), x, weight, ends)
        assert len(grouped_products) == 2

    @pytest.mark.parametrize(
        "rows, weight",
        [
            ((9, 12), torch.randn(2, 16, 12)),  # 24 bytes a row
            ((9, 16), torch.randn(2, 16, 12).mT),
            ((9, 16), torch.randn(1 + 2 * 8 * 16)[1:].view(2, 8, 16)),  # an odd address, once it is bfloat16
            ((9, 16), torch.randn(2, 8 * 16 + 1)[:, :-1].view(2, 8, 16)),  # an odd stride from matrix to matrix
            ((0, 16), torch.randn(2, 8, 16)),
            ((9, 16), torch.randn(2, 0, 16)),
            ((9, 0), torch.randn(2, 8, 0)),
            ((9, 8), torch.randn(1024, 1, 8)),
        ],
    )
    def test_what_it_does_not_take(self, grouped_products: list[Tensor], rows: tuple[int, int], weight: Tensor) -> None:
        as_it_lies = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bfloat16)
        if weight.storage_offset():
            as_it_lies = torch.empty(weight.numel() + 1, dtype=torch.bfloat16)[1:].view(weight.shape)
        weight = as_it_lies.copy_(weight)
        x = torch.randn(rows).bfloat16()
        ends = torch.full((len(weight),), len(x))
        close(gpu.GROUPED_LINEAR(x, weight, ends), x, weight, ends)
        assert not grouped_products

    @pytest.mark.parametrize("major, there", [(8, False), (9, True), (10, True), (12, False)])
    def test_devices(self, monkeypatch: pytest.MonkeyPatch, major: int, there: bool) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        assert gpu.has_kernel.__wrapped__(torch.device("cuda", 0)) is (there and not torch.version.hip)
        assert gpu.has_kernel.__wrapped__(torch.device("cpu")) is False


class TestBinding:
    def test_on_cuda_it_has_a_kernel_that_can_be_recorded(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            kernel = best_kernel(grouped_linear, "cuda", dtype)
            assert kernel is not None and kernel.target is gpu.GROUPED_LINEAR and kernel.capturable

    def test_elsewhere_its_reference_is_the_kernel(self, caplog: pytest.LogCaptureFixture) -> None:
        for device, portable in (("cpu", False), ("cpu", True), ("cuda", True)):
            kernel = best_kernel(grouped_linear, device, torch.float32, portable=portable)
            assert kernel is not None and kernel.target is grouped_linear
        with caplog.at_level(logging.WARNING):
            _, new, _, _ = applied(build(Split), bind_kernels.PASS)
        assert new.count("treespec.grouped_linear") == 2 and "the reference runs" not in caplog.text

    def test_a_graph_for_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def on_cuda(node: fx.Node, **_: Any) -> Any:
            return best_kernel(node.target, "cuda", node.meta["val"].dtype)

        monkeypatch.setattr(bind_kernels, "best_kernel_for", on_cuda)
        _, new, _, _ = applied(build(Split), bind_kernels.PASS)
        assert new.count("treespec_aten.grouped_linear") == 2 and "treespec.grouped_linear" not in new

    @pytest.mark.parametrize("op", OPS)
    def test_no_obstacle_to_a_recording(self, op: Any) -> None:
        graph = fx.Graph()
        graph.output(graph.call_function(op, tuple(graph.placeholder(name) for name in ("x", "weight", "ends"))))
        kernel = kernel_of(op)
        assert kernel is not None and kernel.capturable
        assert obstacle(graph, torch.device("cuda")) == ""
