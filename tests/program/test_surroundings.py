"""What is around a conversion: other compilations, switches of torch's, devices without numbers, a missing compiler."""

from __future__ import annotations

from collections.abc import Callable

import modules
import pytest
import torch
from oracles import EAGER
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidWeight, MissingCompiler, Refusal

pytestmark = pytest.mark.converts  # what is around a conversion

PROMPT = [1, 2, 3]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return modules.NanoGPT().eval()


def _wanted() -> list[int]:
    model, ids = _model(), [*PROMPT]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids


def _generated(model: nn.Module) -> list[int]:
    return treespec.generate(model, PROMPT, max_new_tokens=3, options=EAGER).sequences[0].tolist()


def _compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    model(torch.tensor([PROMPT]))
    return model


def _compiled_block(model: nn.Module) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[index, operator]
    model(torch.tensor([PROMPT]))
    return model


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return torch.compile(model, backend="eager")


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "twice": lambda model: torch.compile(torch.compile(model, backend="eager"), backend="eager"),
    "in place and once more": _compiled_in_place,
    "its forward": _compiled_forward,
    "a part": _compiled_block,
}


@pytest.mark.parametrize("how", COMPILED)
def test_models_that_are_compiled_already(how: str) -> None:
    assert _generated(COMPILED[how](_model())) == _wanted()


@pytest.mark.rare
def test_generate_inside_a_compiled_function() -> None:
    model = _model()

    @torch.compile(backend="eager")
    def run(x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        x = x + 1
        tokens: list[int] = []
        for step in treespec.stream(model, PROMPT, max_new_tokens=3, options=EAGER):
            tokens += step.tokens
        return x * 2, _generated(model), tokens

    for size in (2, 3):
        x, sequence, tokens = run(torch.ones(size))
        assert x.tolist() == [4.0] * size and sequence == _wanted() == [*PROMPT, *tokens]


def test_a_stance_is_for_the_users_own_compilations() -> None:
    with torch.compiler.set_stance("force_eager"):
        assert _generated(_model()) == _wanted()


def _refusal() -> treespec.Unsupported:
    with pytest.raises(treespec.Unsupported) as caught:
        treespec.tree_program(_model(), options=EAGER)
    return caught.value


def test_dynamo_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    refusal = _refusal()
    assert refusal.kind is Refusal.NO_GRAPH and "TORCHDYNAMO_DISABLE" in refusal.reason
    out = treespec.generate(_model(), PROMPT, max_new_tokens=3, options=EAGER, on_unsupported="fallback")
    assert out.sequences[0].tolist() == _wanted()
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with torch._dynamo.config.patch(disable=True):
        assert "TORCH_COMPILE_DISABLE" in _refusal().reason


def test_a_dispatch_mode_around_it() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        refusal = _refusal()
    assert refusal.kind is Refusal.NO_GRAPH and "dispatch mode" in refusal.reason


def test_weights_on_meta_convert_and_do_not_run() -> None:
    with torch.device("meta"):
        model = modules.NanoGPT().eval()
    program = treespec.tree_program(model, options=EAGER)
    assert program.max_context == modules.CONTEXT
    with pytest.raises(InvalidWeight, match="meta device"):
        program.prefill(PROMPT, program.new_cache(8))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx
    from torch._inductor.exc import InvalidCxxCompiler

    def fails(*_: object) -> None:
        try:
            raise InvalidCxxCompiler("no-such-compiler")
        except InvalidCxxCompiler as error:
            raise RuntimeError("the backend failed") from error

    model = _model()
    program = treespec.tree_program(model, options={"lowering": "inductor"})
    monkeypatch.setattr(compile_fx, "compile_fx", fails)
    with pytest.raises(MissingCompiler, match=r'lowering="eager"'):
        program.new_cache(8)
