"""Named outputs: hidden states tapped from the tree graph are the eager model's on every root path."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import EAGER, TOLERANCE, assert_rows, eager_row, error, random_tree
from torch import nn

from treespec_compiler import Forest, TokenTree, tree_program
from treespec_compiler.errors import InvalidOption, Unsupported
from treespec_compiler.ir.verify import problems
from treespec_compiler.passes.tap import tap
from treespec_compiler.program.early_exit import EarlyExitProgram
from treespec_compiler.program.lowering import compile_calls
from treespec_compiler.program.outputs import taps_of

PREFIX = [3, 1, 4, 1, 5, 9]


def hidden_states(model: nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """[S, D] before the first layer and behind each, by name: transformers gives the last one after the final norm, as
    the head reads it, so hooks."""
    layers = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    found: list[torch.Tensor] = []

    def keep(_module, _arguments, output) -> None:
        found.append((output if isinstance(output, torch.Tensor) else output[0]).reshape(len(ids), -1))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            said = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()
    for ours, theirs in zip(found[:-1], said[1:-1], strict=True):
        assert torch.equal(ours, theirs[0])
    states = {f"hidden:{k}": state for k, state in enumerate([said[0][0], *found])}
    return {**states, "hidden:head": said[-1][0]}


def names(program) -> tuple[str, ...]:
    return ("logits", *(f"hidden:{k}" for k in range(len(program.sites) + 1)), "hidden:head")


def assert_hidden(model, found, tree, prefix, nodes=None) -> None:
    for row, node in enumerate(range(len(tree)) if nodes is None else nodes):
        for name, state in hidden_states(model, [*prefix, *tree.path_tokens(node)]).items():
            assert error(found[name][row], state[-1]) <= TOLERANCE, f"{name} of node {node}"


@pytest.mark.family
@pytest.mark.parametrize("name", zoo.TYPES)
def test_every_layer_of_every_type(name):
    model = zoo.make(name)
    program = tree_program(model, options=EAGER)
    cache = program.new_cache(64)
    found = program.prefill(PREFIX, cache, outputs=names(program))
    assert error(found["logits"], eager_row(model, PREFIX)) <= TOLERANCE
    for output, state in hidden_states(model, PREFIX).items():
        assert error(found[output], state) <= TOLERANCE, f"{output} of the prompt"
    tree = random_tree(6, zoo.VOCAB, 1)
    found = program.verify(tree, cache, outputs=names(program))
    assert tuple(found) == names(program) and found["logits"].shape == (6, zoo.VOCAB)
    assert_rows(model, found["logits"], tree, PREFIX)
    assert_hidden(model, found, tree, PREFIX)
    state = program.variant(("tap", names(program)[1:]), None).state
    assert problems(state.graph, state.level, state.outputs) == []


@pytest.fixture(scope="module")
def model():
    return zoo.make("mistral", num_hidden_layers=3)


@pytest.fixture(scope="module")
def program(model):
    return tree_program(model, options=EAGER)


@pytest.mark.rare
def test_grown_in_a_forest_after_commits(model, program):
    cache = program.new_cache(64, slots=2)
    program.prefill(PREFIX, cache, 1)
    program.prefill([7, 8], cache, 0)
    first = random_tree(5, zoo.VOCAB, 2)
    program.verify(Forest([(1, first)]), cache)
    path = first.path(4)
    cache.commit({1: path})
    prefix = [*PREFIX, *(first.tokens[i] for i in path)]
    grown, other = random_tree(7, zoo.VOCAB, 3), random_tree(3, zoo.VOCAB, 4)
    begun = TokenTree(grown.tokens[:3], grown.parents[:3])
    program.verify(Forest([(1, begun)]), cache)
    found = program.extend(Forest([(1, grown), (0, other)]), cache, start={1: 3}, outputs=names(program))
    assert_hidden(model, {n: x[:4] for n, x in found.items()}, grown, prefix, range(3, 7))
    assert_hidden(model, {n: x[4:] for n, x in found.items()}, other, [7, 8])


@pytest.mark.rare
def test_a_long_prompt_comes_in_chunks(model):
    program = tree_program(model, options={**EAGER, "prefill_chunk": 4})
    cache = program.new_cache(64)
    ids = [(5 * i + 2) % zoo.VOCAB for i in range(11)]
    found = program.prefill(ids, cache, outputs=("hidden:3", "hidden:1", "logits"))
    assert list(found) == ["hidden:3", "hidden:1", "logits"] and cache.length() == 11
    states = hidden_states(model, ids)
    assert all(error(found[name], states[name]) <= TOLERANCE for name in ("hidden:1", "hidden:3"))
    assert error(found["logits"], eager_row(model, ids)) <= TOLERANCE


@pytest.mark.rare
def test_nothing_is_paid_where_nothing_is_tapped(model):
    program = tree_program(model, options={**EAGER, "max_context": 200})
    code, cache = program.graph_module.code, program.new_cache(64)
    program.verify(TokenTree([1], [-1]), cache)
    assert not program._made.variants
    for _ in range(2):
        program.verify(TokenTree([1], [-1]), cache, outputs=("hidden:1", "logits"))
        program.verify(TokenTree([1], [-1]), cache, outputs=("logits", "hidden:1"))
        program.verify(TokenTree([1], [-1]), cache, outputs=("logits",))
    assert list(program._made.variants) == [("tap", ("hidden:1",))]  # one graph for one set
    assert program.graph_module.code == code and program.state.outputs == ["logits"]
    tapped = program._made.variants["tap", ("hidden:1",)]
    weights = [x.data_ptr() for x in tapped._fixed() if x is not None]
    assert set(weights) <= {x.data_ptr() for x in program._executor._fixed() if x is not None}


@pytest.mark.rare
@pytest.mark.converts
def test_compiled_once_and_without_another_copy_of_the_graph(model):
    program = tree_program(model, options={"lowering": "inductor"})
    cache = program.new_cache(64)
    program.prefill(PREFIX, cache)
    tree = random_tree(6, zoo.VOCAB, 5)
    asked = ("logits", "hidden:0", "hidden:2", "hidden:3")
    program.verify(tree, cache, outputs=asked)
    before = compile_calls(), program.compile_count
    for seed in range(3):
        tree = random_tree(4 + seed, zoo.VOCAB, seed)
        found = program.verify(tree, cache, outputs=asked)
        assert_rows(model, found["logits"], tree, PREFIX)
        for node in range(len(tree)):
            states = hidden_states(model, [*PREFIX, *tree.path_tokens(node)])
            for k in (0, 2, 3):
                assert error(found[f"hidden:{k}"][node], states[f"hidden:{k}"][-1]) <= TOLERANCE
    assert (compile_calls(), program.compile_count) == before and program.compile_count == 2


@pytest.mark.rare
def test_other_weights_and_another_dtype_are_followed():
    model = zoo.make("llama")
    program = tree_program(model, options=EAGER)
    tree = random_tree(4, zoo.VOCAB, 6)
    program.verify(tree, program.new_cache(64), outputs=("hidden:2",))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    found = program.verify(tree, program.new_cache(64), outputs=names(program))
    assert_hidden(model, found, tree, [])
    model.double()
    program.refresh()
    found = program.verify(tree, program.new_cache(64), outputs=names(program))
    assert found["hidden:1"].dtype == torch.float64
    assert_hidden(model, found, tree, [])


@pytest.mark.parametrize(
    "asked", ["logits", (), ("hidden:4",), ("hidden:-1",), ("hidden:01",), ("hidden",), ("logit",), (1,), 3]
)
@pytest.mark.family
def test_unknown_names_are_refused_by_what_there_is(program, asked):
    cache = program.new_cache(64)
    for call in (program.verify, program.extend):
        with pytest.raises(InvalidOption, match=r"option outputs.*expected names out of logits, hidden:0 to hidden:3"):
            call(TokenTree([1], [-1]), cache, outputs=asked)
    with pytest.raises(InvalidOption, match="hidden:0 to hidden:3"):
        program.prefill(PREFIX, cache, outputs=asked)
    assert cache.length() == 0 and cache.uncommitted() is None


def test_names_are_put_in_order_once():
    assert taps_of(["hidden:3", "logits", "hidden:0", "hidden:3"], 3) == ("hidden:0", "hidden:3")


class Skipping(nn.Module):
    """Its embeddings skip the first two of three layers."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, input_ids):
        body = self.base.model
        first = hidden = body.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rope = body.rotary_emb(hidden, positions)
        for index, layer in enumerate(body.layers):
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
            if index == 1:
                hidden = hidden + first
        return self.base.lm_head(body.norm(hidden))


def test_a_layer_that_something_bypasses_has_no_hidden_state():
    model = Skipping(zoo.make("llama", num_hidden_layers=3))
    program = tree_program(model, options=EAGER)
    cache = program.new_cache(64)
    with pytest.raises(Unsupported, match="no single value carries everything from attention 0 to attention 1"):
        program.verify(TokenTree([1], [-1]), cache, outputs=("logits", "hidden:1"))
    found = program.verify(TokenTree([1, 2], [-1, 0]), cache, outputs=("logits", "hidden:2"))
    assert found["hidden:2"].shape == (2, 64)


@pytest.mark.rare
def test_one_layer_has_nothing_to_compare_its_end_with():
    program = tree_program(zoo.make("llama", num_hidden_layers=1), options=EAGER)
    cache = program.new_cache(64)
    with pytest.raises(Unsupported, match="there is one attention layer"):
        program.verify(TokenTree([1], [-1]), cache, outputs=("hidden:1",))
    assert program.verify(TokenTree([1], [-1]), cache, outputs=("hidden:0",))["hidden:0"].shape == (1, 64)


@pytest.mark.rare
def test_a_pipeline_may_tap_every_layer(model):
    program = tree_program(model, options={**EAGER, "pipeline": "default,tap"})
    assert program.history["tap"].matches == 5 and program.state.outputs == list(names(program))
    cache, tree = program.new_cache(64), random_tree(5, zoo.VOCAB, 7)
    assert_rows(model, program.verify(tree, cache), tree, [])
    assert_hidden(model, program.verify(tree, cache, outputs=names(program)), tree, [])
    assert not program._made.variants
    assert tap(program.state.copy(), ["hidden:1", "hidden:2"]) == 0
    assert EarlyExitProgram(program, 2).verify(tree, cache).shape == (5, zoo.VOCAB)
