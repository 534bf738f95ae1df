"""The exit cut from the target's own graph, against the eager model with fewer layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fake_program import FakeProgram, greedy, module_row, table_row
from llamas import EAGER, PROMPT, llama
from safetensors.torch import save_file

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, UnreadableModel, Unsupported
from treespec_compiler.passes.residual.early_exit import early_exit
from treespec_compiler.passes.residual.stream import cuts
from treespec_compiler.program.early_exit import EarlyExitProgram, ExitHead
from treespec_compiler.speculation.drafts.early_exit import EarlyExitDraft, choose_layers
from treespec_compiler.speculation.drafts.kinds import DraftContext, make_drafts

transformers = pytest.importorskip("transformers")

TREE = treespec.TokenTree([9, 8, 7, 6, 5, 4], [-1, 0, 0, 1, 2, 4])


@pytest.fixture(scope="module")
def target():
    return llama(0, layers=4)


@pytest.fixture(scope="module")
def program(target):
    return treespec.tree_program(target, options=EAGER)


def truncated(model, layers: int):
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:layers]
    return short


def expected(model, prefix, tree):
    with torch.no_grad():
        rows = [model(torch.tensor([[*prefix, *tree.path_tokens(i)]])).logits[0, -1] for i in range(len(tree))]
    return torch.stack(rows)


@pytest.mark.family
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_eager_model_with_fewer_layers(target, program, layers, lowering):
    cache = program.new_cache(64)
    program.prefill(PROMPT, cache)
    exit_ = EarlyExitProgram(program, layers, lowering=lowering)
    short = truncated(target, layers)
    want = expected(short, PROMPT, TREE)
    close = {"rtol": 0, "atol": 1e-4 * float(want.abs().max())}
    torch.testing.assert_close(exit_.verify(TREE, cache), want, **close)
    # Grown level by level, after the target has committed a path of its own.
    path = [0, 2, 4]
    program.verify(TREE, cache)
    cache.commit(path)
    prefix = [*PROMPT, *(TREE.tokens[i] for i in path)]
    want = expected(short, prefix, TREE)
    first = treespec.TokenTree(TREE.tokens[:3], TREE.parents[:3])
    got = torch.cat([exit_.extend(first, cache), exit_.extend(TREE, cache, 3)])
    torch.testing.assert_close(got, want, **close)


def test_only_uncommitted_nodes_of_the_first_sites_are_written(program):
    cache = program.new_cache(64)
    program.prefill(PROMPT, cache)
    before = [pool.clone() for pool in cache.pools]
    EarlyExitProgram(program, 2).verify(TREE, cache)
    length = cache.length(0)
    for index, (old, new) in enumerate(zip(before, cache.pools, strict=True)):
        assert torch.equal(old[:, :, :length], new[:, :, :length])
        assert torch.equal(old, new) == (index // 2 >= 2)
    # Verification is not disturbed by it.
    other = program.new_cache(64)
    program.prefill(PROMPT, other)
    torch.testing.assert_close(program.verify(TREE, cache), program.verify(TREE, other), rtol=0, atol=0)


def test_nothing_is_held_twice(program):
    exit_ = EarlyExitProgram(program, 2)
    held = {x.data_ptr() for x in program._made.bound.tensors.values()}
    assert all(x is None or x.data_ptr() in held for x in exit_._executor()._fixed())
    assert exit_.weight_bytes < program.weight_bytes


def test_the_pass_drops_the_later_sites_and_leaves_the_original_alone(program):
    state = program.state
    code = state.gm.code
    cut = state.copy()
    assert early_exit(cut, 1) == 3
    assert len(cut.sites) == 1 and len(cut.graph.nodes) < len(state.graph.nodes) / 2
    assert [n.name for n in cut.graph.nodes if n.name.startswith("pool_")] == ["pool_k_0", "pool_v_0"]
    assert state.gm.code == code
    cut.graph.lint()


def test_the_residual_stream_is_found_by_structure(program):
    groups = cuts(program.state)
    # In every layer the values after attention and after the feed-forward block; then the final norm's parts too.
    assert [len(group) for group in groups[1:4]] == [2, 2, 2] and len(groups[4]) > 2


@pytest.mark.parametrize("layers", [0, 4, 9])
def test_an_exit_outside_the_model_is_refused(program, layers):
    with pytest.raises(Unsupported, match=f"an early exit after {layers} of 4 attention layers"):
        EarlyExitProgram(program, layers)


@pytest.mark.rare
def test_a_model_of_one_layer_has_no_exit():
    program = treespec.tree_program(llama(1, layers=1), options=EAGER)
    with pytest.raises(Unsupported, match="no layer of this model has an early exit"):
        choose_layers(program, PROMPT)


class Skipping(torch.nn.Module):
    """Two attention layers, with a value of the first that skips to the head."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.config = base.config

    def forward(self, input_ids):
        body = self.base.model
        x = body.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rope = body.rotary_emb(x, positions)
        mask = None
        hidden = x
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return self.base.lm_head(body.norm(hidden + x))


def test_values_that_bypass_the_residual_stream_are_refused():
    try:
        program = treespec.tree_program(Skipping(llama(2, layers=2)), options=EAGER)
    except Unsupported as refusal:
        pytest.skip(f"the probe itself is refused: {refusal.reason}")
    with pytest.raises(Unsupported, match="no single value carries everything from attention 0 to attention 1"):
        EarlyExitProgram(program, 1)


def test_a_trained_head_replaces_the_final_norm(target, program):
    torch.manual_seed(5)
    width = target.config.hidden_size
    head = ExitHead(2, torch.rand(width) + 0.5, torch.randn(width, width) / width**0.5, 1e-5)
    cache = program.new_cache(64)
    program.prefill(PROMPT, cache)
    got = EarlyExitProgram(program, 2, head).verify(TREE, cache)
    rows = []
    with torch.no_grad():
        for i in range(len(TREE)):
            ids = torch.tensor([[*PROMPT, *TREE.path_tokens(i)]])
            h = target.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
            h = head.norm * h * torch.rsqrt(h.pow(2).mean() + head.eps)
            rows.append(target.lm_head(head.projection @ h))
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidOption, match="the layer the head was trained for"):
        EarlyExitProgram(program, 1, head)


@pytest.mark.parametrize("policy", ["auto", "2,1", "chain:3", "best-first:6", "equal-growth:2,3"])
@pytest.mark.parametrize("draft", ["early-exit:3", "early-exit", ["early-exit:1", "ngram"]])
def test_output_is_exact(target, policy, draft):
    truth = greedy(module_row(target), PROMPT, 32)
    out = treespec.generate(target, PROMPT, draft=draft, max_new_tokens=32, policy=policy, options=EAGER)
    assert out.sequences.tolist() == [truth]
    if draft == "early-exit:3" and policy != "auto":
        assert out.stats.accepted > 0


@pytest.mark.rare
def test_merged_with_a_model_draft(target):
    truth = greedy(module_row(target), PROMPT, 32)
    drafts = [llama(7, layers=1), "early-exit:2", "ngram"]
    out = treespec.generate(target, PROMPT, draft=drafts, max_new_tokens=32, policy="2,1", options=EAGER)
    assert out.sequences.tolist() == [truth]
    assert out.stats.draft_prefill_seconds > 0


def test_sampled_output_with_an_exit_is_reproducible(target):
    runs = [
        treespec.generate(
            target,
            PROMPT,
            draft="early-exit:3",
            max_new_tokens=24,
            policy="2,2",
            temperature=0.8,
            seed=3,
            options=EAGER,
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)


@pytest.mark.rare
def test_layers_are_chosen_by_agreement_and_cost():
    model = llama(3, layers=4)
    with torch.no_grad():  # the last two layers do nothing: an exit after two is the model itself
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    program = treespec.tree_program(model, options=EAGER)
    assert choose_layers(program, PROMPT * 6) == 2
    out = treespec.generate(model, PROMPT, draft="early-exit", max_new_tokens=20, policy="chain:3", options=EAGER)
    assert out.stats.tokens_per_step > 3


@pytest.mark.rare
def test_an_exit_of_another_model_is_refused(target):
    other = treespec.tree_program(llama(8), options=EAGER)
    with pytest.raises(InvalidOption, match="early-exit:1 of another model"):
        treespec.generate(target, PROMPT, draft=EarlyExitDraft(other, 1), options=EAGER)


def test_a_trained_head_is_named_by_its_file(target, tmp_path):
    width = target.config.hidden_size
    path = tmp_path / "head.safetensors"
    save_file({"norm.weight": torch.ones(width), "proj.weight": torch.eye(width)}, path)
    (tmp_path / "head.json").write_text(json.dumps({"layer": 2, "eps": target.config.rms_norm_eps}))
    program = treespec.tree_program(target, options=EAGER)
    (draft,) = make_drafts(f"early-exit:{path}", DraftContext(program, program.options))
    own = draft.program._executor()._own
    assert draft.name == "early-exit:2" and [x.numel() for x in own.values()] == [width, width * width]
    truth = greedy(module_row(target), PROMPT, 24)
    out = treespec.generate(program, PROMPT, draft=f"early-exit:{path}", max_new_tokens=24, policy="chain:2")
    assert out.sequences.tolist() == [truth]


@pytest.mark.parametrize(
    ("tensors", "about", "problem"),
    [
        ({"norm.weight": torch.ones(4)}, '{"layer": 1, "eps": 1e-6}', "KeyError: 'proj.weight'"),
        ({"norm.weight": torch.ones(4), "proj.weight": torch.eye(4)}, '{"layer": 1}', "KeyError: 'eps'"),
        ({"norm.weight": torch.ones(4), "proj.weight": torch.ones(4, 3)}, '{"layer": 1, "eps": 0}', r"\[4, 3\]"),
        ({"norm.weight": torch.ones(4), "proj.weight": torch.eye(4)}, "{", "JSONDecodeError"),
        (None, '{"layer": 1, "eps": 1e-6}', "No such file"),
    ],
)
def test_heads_that_cannot_be_read_are_named(tmp_path, tensors, about, problem):
    path = tmp_path / "head.safetensors"
    if tensors:
        save_file(tensors, path)
    path.with_suffix(".json").write_text(about)
    with pytest.raises(UnreadableModel, match=problem):
        ExitHead.load(path)


def test_a_head_of_another_width_is_refused(target):
    program = treespec.tree_program(target, options=EAGER)
    head = ExitHead(1, torch.ones(4), torch.eye(4), 1e-6)
    with pytest.raises(Unsupported, match="the trained head is for a width of 4, this model has"):
        EarlyExitDraft(program, 1, head)


@pytest.mark.parametrize("name", ["early-exit:x", "early-exit:0", "lookup"])
def test_unknown_drafts_are_refused(name):
    with pytest.raises(InvalidOption, match="Invalid option draft"):
        treespec.generate(FakeProgram(table_row(8), 8), [1], draft=name)
