"""Weight expressions: each kind and their compositions, from a module's tensors and from a file; what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from treespec_compiler.errors import InvalidWeight
from treespec_compiler.ir.linear import pack_weight
from treespec_compiler.ir.ops import packed_linear
from treespec_compiler.ir.stored_weights import Pack
from treespec_compiler.ir.weights import Expression, Join, Read, Shard, Source, Table, Transpose

TENSORS = {
    "q": torch.randn(12, 8),
    "k": torch.randn(4, 8),
    "conv": torch.randn(8, 6),
    "bias": torch.randn(12),
    "half": torch.randn(4, 8).bfloat16(),
    "strided": torch.randn(8, 12).t(),
}
Q, K, CONV, BIAS, HALF, STRIDED = (Source.of(name, tensor) for name, tensor in TENSORS.items())


@dataclass(frozen=True)
class Doubled:
    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return 2 * tensors["x"]


def table(function: object, of: Expression) -> Table:
    return Table(function, (("x", of),), of.shape, of.dtype, of.device)  # type: ignore[arg-type]


def from_file(path: Path) -> Read:
    """A reader of a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    handle = safe_open(path, "pt")
    return handle.get_tensor


EXPECTED: dict[str, tuple[Expression, Tensor]] = {
    "source": (Q, TENSORS["q"]),
    "source with strides": (STRIDED, TENSORS["strided"]),
    "transpose": (Transpose(CONV), TENSORS["conv"].t()),
    "join": (Join((Q, K)), torch.cat([TENSORS["q"], TENSORS["k"]])),
    "join along columns": (Join((Q, STRIDED), 1), torch.cat([TENSORS["q"], TENSORS["strided"]], 1)),
    "join with a transpose": (Join((Q, Transpose(CONV))), torch.cat([TENSORS["q"], TENSORS["conv"].t()])),
    "join of one": (Join((STRIDED,)), TENSORS["strided"]),
    "shard of rows": (Shard(Q, 0, 1, 3), TENSORS["q"][4:8]),
    "shard of heads": (Shard(Q, 0, 1, 2, unit=3), TENSORS["q"][6:]),
    "shard of columns": (Shard(Q, 1, 3, 4), TENSORS["q"][:, 6:]),
    "shard of a bias": (Shard(BIAS, 0, 0, 2), TENSORS["bias"][:6]),
    "shard of a shard": (Shard(Shard(Q, 0, 2, 3), 0, 1, 2), TENSORS["q"][10:12]),
    "pack": (Pack(Q), pack_weight(TENSORS["q"])),
    "pack of bfloat16": (Pack(HALF), pack_weight(TENSORS["half"])),
    "pack of a join": (Pack(Join((Q, K))), pack_weight(torch.cat([TENSORS["q"], TENSORS["k"]]))),
    "pack of a shard": (Pack(Shard(Q, 0, 1, 2)), pack_weight(TENSORS["q"][6:])),
    "pack of a shard of columns": (Pack(Shard(Q, 1, 0, 2)), pack_weight(TENSORS["q"][:, :4])),
    "join of shards": (
        Join((Shard(Q, 0, 1, 2, unit=2), Shard(K, 0, 1, 2))),
        torch.cat([TENSORS["q"][6:], TENSORS["k"][2:]]),
    ),
    "pack of a join of shards": (
        Pack(Join((Shard(Q, 0, 0, 2), Shard(Transpose(CONV), 0, 0, 2)))),
        pack_weight(torch.cat([TENSORS["q"][:6], TENSORS["conv"].t()[:3]])),
    ),
    "shard of a join": (Shard(Join((Q, K)), 0, 1, 2), torch.cat([TENSORS["q"], TENSORS["k"]])[8:]),
    "table": (table(Doubled(), Q), 2 * TENSORS["q"]),
    "table of a join": (table(Doubled(), Join((Q, K))), 2 * torch.cat([TENSORS["q"], TENSORS["k"]])),
    "shard of a table": (Shard(table(Doubled(), Q), 0, 2, 3), 2 * TENSORS["q"][8:]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_built_is_what_was_inferred(name: str, tmp_path: Path) -> None:
    """From the tensors themselves and from a file, which knows no strides."""
    expression, expected = EXPECTED[name]
    assert expression.shape == tuple(expected.shape) and expression.dtype == expected.dtype
    for read in (TENSORS.__getitem__, from_file(tmp_path / "weights.safetensors")):
        built = expression.build(read)
        assert torch.equal(built, expected) and built.device == expression.device
        if isinstance(expression, Source):
            assert built.stride() == expression.stride
        elif not isinstance(expression, (Transpose, Table)):
            assert built.is_contiguous()


def test_a_source_is_the_models_own_memory() -> None:
    for source in (Q, STRIDED):
        built = source.build(TENSORS.__getitem__)
        assert built.data_ptr() == TENSORS[source.name].data_ptr()
    weight = torch.nn.Parameter(TENSORS["q"])
    assert not Q.build({"q": weight}.__getitem__).requires_grad


def test_sources_are_named_once_in_order() -> None:
    assert Pack(Join((Shard(Q, 0, 1, 2), K, Shard(Q, 0, 0, 2)))).sources == ("q", "k")
    assert table(Doubled(), Join((Q, K))).sources == ("q", "k")
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return TENSORS[name]

    Pack(Join((Q, Transpose(CONV)))).build(read)
    assert asked == ["q", "conv"]


def test_equal_expressions_are_one() -> None:
    again = Source.of("q", TENSORS["q"].clone())
    assert Pack(Join((again, K))) == Pack(Join((Q, K))) and len({Pack(Q), Pack(again), Pack(K)}) == 2
    assert Source.of("q", TENSORS["strided"]) != Q, "a layout is part of what a source is"


def test_products_of_shards_add_up_to_the_product() -> None:
    """What tensor parallelism asks of it: rows of heads concatenate, columns add."""
    x = torch.randn(3, 8)
    whole = x @ TENSORS["q"].t()
    rows = [Pack(Shard(Q, 0, rank, 2, unit=3)).build(TENSORS.__getitem__) for rank in range(2)]
    joined = torch.cat([packed_linear(x, w, None, 6) for w in rows], -1)
    torch.testing.assert_close(joined, whole)
    columns = [Pack(Shard(Q, 1, rank, 2)).build(TENSORS.__getitem__) for rank in range(2)]
    torch.testing.assert_close(
        packed_linear(x[:, :4].contiguous(), columns[0], None, 12)
        + packed_linear(x[:, 4:].contiguous(), columns[1], None, 12),
        whole,
    )


def test_texts() -> None:
    text = str(Pack(Join((Q, Shard(K, 0, 1, 2), Transpose(CONV)))))
    assert text == "pack(join(q, shard(k, dim 0, 1 of 2), transpose(conv)))"


REFUSED = {
    "heads do not divide": (lambda: Shard(Q, 0, 0, 2, unit=4), "2 units of 4"),
    "a size does not divide": (lambda: Shard(K, 0, 0, 3), "got k as float32"),
    "no such part": (lambda: Shard(Q, 0, 2, 2), "part 2 of 2"),
    "no unit": (lambda: Shard(Q, 0, 0, 2, unit=0), "positive unit"),
    "no such dimension": (lambda: Shard(BIAS, 1, 0, 2), "dimension 1"),
    "joined widths differ": (lambda: Join((Q, CONV)), "got conv"),
    "joined dtypes differ": (lambda: Join((K, HALF)), "got half"),
    "nothing to join": (lambda: Join(()), "no pieces"),
    "a bias is not packed": (lambda: Pack(BIAS), "a matrix"),
    "a bias is not transposed": (lambda: Transpose(BIAS), "a matrix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(InvalidWeight, match=text):
        make()


def test_another_tensor_under_the_name_is_refused() -> None:
    with pytest.raises(InvalidWeight, match=r"got q as float32 \[4, 8\], expected q as float32 \[12, 8\]"):
        Pack(Q).build({"q": TENSORS["k"]}.__getitem__)
    with pytest.raises(InvalidWeight, match="bfloat16"):
        K.build({"k": TENSORS["half"]}.__getitem__)
    with pytest.raises(InvalidWeight, match="a table of"):
        table(lambda tensors: tensors["x"][:1], Q).build(TENSORS.__getitem__)
