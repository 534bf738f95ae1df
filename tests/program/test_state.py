"""The model's code and the state of Python that it reads, changed after a program exists: the program follows."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import VOCAB, Tiny
from oracles import EAGER, TOLERANCE, assert_decodes, eager_row, error
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import TokenTree
from treespec_compiler.errors import StaleCache

SCALE = 1.0
TABLE = torch.ones(VOCAB)


def factor() -> float:
    return 1.0


class Config:
    def __init__(self) -> None:
        self.scale, self.nested = 1.0, {"add": 0.0}


class Reader(Tiny):
    """Reads what there is to read: attributes, a configuration, globals, lists, closures, flags."""

    shift = 0.0

    def setup(self) -> None:
        self.config = Config()
        self.temperature, self.window, self.act = 1.0, 4, torch.nn.functional.relu
        self.tables = [torch.ones(VOCAB)]
        self.extra: float | None = None
        self.tail = nn.ModuleList([nn.Identity()])
        self.drop = nn.Dropout(0.5)

    def mask(self, tokens: int) -> Tensor:
        q, k = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        return (k <= q) & (q - k < self.window)

    def finish(self, x: Tensor) -> Tensor:
        x = self.act(x) * self.temperature * self.config.scale * SCALE * factor() + self.shift
        if self.head.weight.requires_grad:
            x = x + 1
        for module in self.tail:
            x = module(x)
        x = self.drop(x) + self.config.nested["add"]
        if self.extra is not None:
            x = x * self.extra
        return self.head(x) * self.tables[0] * TABLE


def build(cls: type[Tiny] = Reader) -> Any:
    torch.manual_seed(0)
    return spread(cls()).eval()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: setattr(m, "temperature", 3.0),
    "window": lambda m: setattr(m, "window", 2),
    "activation": lambda m: setattr(m, "act", torch.tanh),
    "configuration": lambda m: setattr(m.config, "scale", 2.0),
    "dictionary": lambda m: m.config.nested.update(add=1.0),
    "epsilon": lambda m: setattr(m.norms[0], "eps", 1.0),
    "none to number": lambda m: setattr(m, "extra", 2.0),
    "tensor in a list": lambda m: m.tables.__setitem__(0, torch.full((VOCAB,), 2.0)),
    "hook": lambda m: m.norms[0].register_forward_hook(lambda _m, _a, out: out * 2),
    "pre hook": lambda m: m.head.register_forward_pre_hook(lambda _m, args: (args[0] * -1,)),
    "hook of the model": lambda m: m.register_forward_hook(lambda _m, _a, out: out.tanh()),
    "method": lambda m: setattr(m, "finish", types.MethodType(lambda self, x: self.head(x), m)),
    "forward of a part": lambda m: setattr(m.out[0], "forward", lambda x: x * 0.5),
    "class of a part": lambda m: setattr(m.out[0], "__class__", Doubled),
    "appended": lambda m: m.tail.append(nn.Tanh()),
    "removed": lambda m: m.tail.__delitem__(0) or m.tail.append(nn.Tanh()),
    "requires_grad": lambda m: m.head.weight.requires_grad_(False),
    "attribute of the class": lambda m: setattr(m, "shift", 1.0),
}


def _row(model: Any, program: Any) -> float:
    ids = [3, 1, 4, 1, 5, 9]
    return error(program.prefill(ids, program.new_cache(16)), eager_row(model, ids))


@pytest.mark.family
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name: str) -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    cache = program.new_cache(16)
    program.prefill([1, 2], cache)
    before = eager_row(model, [3, 1, 4, 1, 5, 9])
    assert _row(model, program) <= TOLERANCE
    CHANGES[name](model)
    assert error(eager_row(model, [3, 1, 4, 1, 5, 9]), before) > 1e-3, "the change changes nothing"
    assert treespec.tree_program(model, options=EAGER) is program
    with pytest.raises(StaleCache):
        program.verify(TokenTree([1], [-1]), cache)
    assert_decodes(model, program, VOCAB, rounds=1)


@pytest.mark.parametrize(
    ("name", "value"), [("SCALE", 2.0), ("factor", lambda: 3.0), ("TABLE", torch.full((VOCAB,), 2.0))]
)
@pytest.mark.family
def test_globals_are_followed(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    monkeypatch.setitem(globals(), name, value)
    assert _row(model, program) <= TOLERANCE
    monkeypatch.undo()
    assert _row(model, program) <= TOLERANCE


@pytest.mark.rare
def test_methods_of_classes_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    monkeypatch.setattr(Reader, "finish", lambda self, x: self.head(x))
    assert _row(model, program) <= TOLERANCE
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(Reader.finish, "__code__", Tiny.finish.__code__)
        assert _row(model, program) <= TOLERANCE


def test_hooks_on_every_module_are_followed() -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    hook = register_module_forward_hook(lambda m, _a, out: out * 2 if isinstance(m, nn.LayerNorm) else out)
    try:
        assert _row(model, program) <= TOLERANCE
    finally:
        hook.remove()
    assert _row(model, program) <= TOLERANCE


@pytest.mark.rare
def test_a_state_that_returns_is_not_converted_again() -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    first = program.graph_module
    for _ in range(2):
        hook = model.register_forward_hook(lambda _m, _a, out: out * 2)
        assert _row(model, program) <= TOLERANCE and program.graph_module is not first
        with torch.no_grad():
            model.head.weight.mul_(1.5)  # the other program's weights change meanwhile
        hook.remove()
        assert _row(model, program) <= TOLERANCE and program.graph_module is first


def test_what_nobody_reads_changes_nothing() -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    first, cache = program.graph_module, program.new_cache(8)
    model.note, model.config.unread = "hello", 3
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert _row(model, program) <= TOLERANCE
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        assert _row(model, program) <= TOLERANCE
    assert program.graph_module is first
    program.prefill([1, 2], cache)


@pytest.mark.rare
def test_a_change_that_is_refused_stays_refused_until_it_goes() -> None:
    model = build()
    program = treespec.tree_program(model, options=EAGER)
    hook = model.register_forward_hook(lambda _m, _a, out: out.cumsum(1))
    for _ in range(2):
        with pytest.raises(treespec.Unsupported):
            program.new_cache(8)
    hook.remove()
    assert _row(model, program) <= TOLERANCE


def test_a_counter_that_is_read_is_refused() -> None:
    class Late(Tiny):
        def setup(self) -> None:
            self.calls = 0

        def finish(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(x) if self.calls <= 50 else self.head(x) * 2

    with pytest.raises(treespec.Unsupported, match=r"the forward pass changes what it reads.*calls"):
        treespec.tree_program(build(Late), options=EAGER)


def test_a_table_made_at_the_first_call_is_no_counter() -> None:
    class Lazy(Tiny):
        def finish(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = torch.arange(VOCAB) / VOCAB
            return self.head(x) + self.table

    model = build(Lazy)
    program = treespec.tree_program(model, options=EAGER)
    first = program.graph_module
    assert_decodes(model, program, VOCAB, rounds=1)
    assert program.graph_module is first


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_arrays_of_numpy_are_followed(change: str) -> None:
    """Each read of one gives another tensor, on the same memory."""
    numpy = pytest.importorskip("numpy")

    class Array(Tiny):
        def setup(self) -> None:
            self.factors = numpy.ones(VOCAB, dtype=numpy.float32)

        def finish(self, x: Tensor) -> Tensor:
            return self.head(x) * torch.from_numpy(self.factors)

    model = build(Array)
    program = treespec.tree_program(model, options=EAGER)
    assert _row(model, program) <= TOLERANCE
    if change == "in place":
        model.factors[: VOCAB // 2] = 3
    else:
        model.factors = model.factors[::-1] * numpy.arange(VOCAB, dtype=numpy.float32)
    assert treespec.tree_program(model, options=EAGER) is program
    assert _row(model, program) <= TOLERANCE


def test_a_program_keeps_no_module_alive() -> None:
    model = build()
    treespec.tree_program(model, options=EAGER)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.rare
def test_autocast_around_a_program_is_left_aside() -> None:
    model, other = build(), build()
    program = treespec.tree_program(model, options=EAGER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = treespec.tree_program(other, options=EAGER)
        rows = [p.prefill([3, 1, 4], p.new_cache(8)) for p in (program, inside)]
    for row in rows:
        assert row.dtype is torch.float32 and error(row, eager_row(model, [3, 1, 4])) <= TOLERANCE
    assert treespec.tree_program(other, options=EAGER) is inside


@pytest.mark.rare
def test_adapters_are_followed() -> None:
    peft = pytest.importorskip("peft")
    zoo = pytest.importorskip("zoo")
    adapter = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.make("llama", num_hidden_layers=1), adapter).eval()
    model.add_adapter("second", adapter)
    ids = torch.tensor([[5, 17, 3, 9, 4]])

    def same() -> list[int]:
        out = treespec.generate(model, ids, draft="ngram", max_new_tokens=8, eos_token_id=(), options=EAGER)
        x = ids
        with torch.no_grad():
            for _ in range(8):
                x = torch.cat([x, model(x).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(x, out.sequences)
        return x[0].tolist()

    first = same()
    with model.disable_adapter():
        plain = same()
    assert plain != first and same() == first
    model.set_adapter("second")
    assert same() != first
    model.set_adapter("default")
    model.merge_adapter()
    assert same() == first
    with model.disable_adapter(), torch.no_grad():
        with pytest.raises(treespec.Unsupported):  # its forward takes the merged weights apart, once
            treespec.tree_program(model, options=EAGER)
        model(ids)
        assert same() == plain
    assert same() == first


@pytest.mark.rare
@pytest.mark.family
@pytest.mark.parametrize("kind", ["LoHa", "saved head", "mixed"])
def test_other_adapters_are_followed(kind: str) -> None:
    """Of the product of two low ranks; a head in another's place; two kinds of adapters at once."""
    peft = pytest.importorskip("peft")
    zoo = pytest.importorskip("zoo")
    where = {"target_modules": ["q_proj", "down_proj"]}
    product = peft.LoHaConfig(r=4, init_weights=False, **where)
    rank = peft.LoraConfig(r=4, init_lora_weights=False, **where)
    head = peft.LoraConfig(r=4, init_lora_weights=False, modules_to_save=["lm_head"], **where)
    torch.manual_seed(0)
    if kind == "mixed":
        model = peft.PeftMixedModel(zoo.make("llama"), rank, "default")
        model.add_adapter("second", product)
        model.set_adapter(["default", "second"])
        model.eval()
    else:
        model = peft.get_peft_model(zoo.make("llama"), product if kind == "LoHa" else head).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = [5, 17, 3, 9, 4]

    def same() -> torch.Tensor:
        program = treespec.tree_program(model, options=EAGER)
        cache = program.new_cache(len(ids) + 1)
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1]
        assert (program.prefill(ids, cache) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        return wanted

    first = same()
    with model.disable_adapter():
        plain = same()
    assert not torch.allclose(plain, first) and torch.allclose(same(), first)
    if kind == "mixed":
        model.set_adapter("second")
        assert not torch.allclose(same(), first)
    else:
        model.merge_adapter()
        assert torch.allclose(same(), first, atol=1e-3)
