"""A refusal's kind decides, its words never do."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import EAGER
from modules import Tiny
from torch import Tensor, nn

from treespec_compiler.capture.call import call_spec
from treespec_compiler.capture.torch_errors import TRACE_ERRORS, kind_of, own_refusal
from treespec_compiler.errors import Refusal, Unsupported
from treespec_compiler.options import Options
from treespec_compiler.pipeline import convert

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for folder in ("treespec_compiler", "passes", "codegen") for p in sorted((ROOT / folder).rglob("*.py"))]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node


def test_every_raise_has_a_kind() -> None:
    found = 0
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        of_passes = any(
            isinstance(n, ast.ImportFrom) and any(a.name == "refuse" for a in n.names) for n in ast.walk(tree)
        )
        for name, call in calls(tree):
            if name == "Unsupported" or (name == "refuse" and of_passes):
                first = ast.unparse(call.args[0])
                assert re.fullmatch(r"Refusal\.[A-Z_]+|kind|_KINDS\[.*\]", first), f"{path}:{call.lineno}: {first}"
                found += 1
    assert found > 60


def test_no_decision_reads_a_reason() -> None:
    """A reason is shown: it stands in a text, in a record, or is handed on; nothing searches it."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            looked_at: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                looked_at = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                looked_at = [node.func.value]
            for part in looked_at:
                assert not (isinstance(part, ast.Attribute) and part.attr == "reason"), f"{path}:{node.lineno}"


def test_the_kinds_are_documented() -> None:
    text = (ROOT / "docs" / "refusals.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE) == [kind.value for kind in Refusal]


class Asserts(Tiny):
    """Ends at 40 tokens."""

    def start(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= 40, "too long"
        return super().start(ids)


class OneLength(Tiny):
    """The same for 16 tokens, but traced for them alone."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(1, 16, -1) if x.shape[1] == 16 else x)


class Scans(Tiny):
    """Not convertible from 30 tokens on."""

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x.cumsum(1) if x.shape[1] >= 30 else x)


class Windowed(Tiny):
    """Something else from 30 tokens on."""

    def mask(self, tokens: int) -> Tensor:
        steps = torch.arange(tokens)
        seen = steps[None, :] <= steps[:, None]
        return seen & (steps[:, None] - steps[None, :] < 8) if tokens >= 30 else seen


Outcome = tuple[Any, ...]


def outcome(factory: Callable[[], nn.Module]) -> Outcome:
    torch.manual_seed(0)
    model = factory().eval()
    try:
        state = convert(model, call_spec(model), Options.parse(EAGER)).state
    except Unsupported as error:
        return "refused", error.kind
    return "converted", min(limit.tokens for limit in state.limits), state.lone_lengths


OUTCOMES: dict[Callable[[], nn.Module], Outcome] = {
    # Tiny has 64 positions.
    Asserts: ("converted", 40, []),
    OneLength: ("converted", 64, [16]),
    Scans: ("converted", 29, []),
    Windowed: ("refused", Refusal.BRANCH),
}


@pytest.mark.family
@pytest.mark.parametrize("factory", OUTCOMES)
def test_other_words_change_no_decision(factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(factory) == OUTCOMES[factory]
    original = Unsupported.__init__

    def reworded(self: Unsupported, kind: Refusal, reason: str, **rest: Any) -> None:
        original(self, kind, "in other words", **rest)

    monkeypatch.setattr(Unsupported, "__init__", reworded)
    assert outcome(factory) == OUTCOMES[factory]


def loops(x: Tensor) -> Tensor:
    for i in x.nonzero():
        x = x + i.sum()
    return x


def branches(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 3 else x


def raises(x: Tensor) -> Tensor:
    if x.shape[1] > 5:
        raise ValueError("too long")
    return x


def specialises(x: Tensor) -> Tensor:
    return x.reshape(1, 8) + 1


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (loops, Refusal.CONTROL),
        (branches, Refusal.CONTROL),
        (raises, Refusal.RAISES),
        (specialises, Refusal.SPECIALISED),
        (breaks, Refusal.NO_GRAPH),
    ],
)
def test_errors_of_torch_have_a_kind_by_their_types(function: Callable[[Tensor], Tensor], kind: Refusal) -> None:
    x = torch.arange(8)[None]
    torch._dynamo.mark_dynamic(x, 1)
    with pytest.raises(TRACE_ERRORS) as caught:
        torch.compile(function, backend="eager", fullgraph=True)(x)
    assert kind_of(caught.value) is kind and own_refusal(caught.value) is None
