"""Medusa heads: what they say, against a plain reference; trees of them; folders that hold none."""

from __future__ import annotations

import json

import pytest
import torch
from llamas import EAGER, PROMPT, llama
from safetensors.torch import load_file, save_file
from torch import Tensor

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, UnreadableModel, Unsupported
from treespec_compiler.ir.outputs import HEAD
from treespec_compiler.program.tree_program import tree_program
from treespec_compiler.speculation.drafts.heads.medusa import MedusaDraft, MedusaHeads
from treespec_compiler.speculation.drafts.protocol import DraftRequest
from treespec_compiler.speculation.policies.protocol import Limits
from treespec_compiler.speculation.policies.static import StaticExpansion

HEADS = 3


@pytest.fixture(scope="module")
def target():
    return llama(1)


def save(folder, *, width=64, vocab=128, blocks=1, prefix="", **config) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for i in range(HEADS):
        for j in range(blocks):
            found[f"{i}.{j}.linear.weight"] = torch.randn(width, width, generator=draw) / 8
            found[f"{i}.{j}.linear.bias"] = torch.randn(width, generator=draw)
        found[f"{i}.{blocks}.weight"] = torch.randn(vocab, width, generator=draw)
    save_file({prefix + name: tensor for name, tensor in found.items()}, str(folder / "medusa_lm_head.safetensors"))
    said = {"medusa_num_heads": HEADS, "medusa_num_layers": blocks, "base_model_name_or_path": "any", **config}
    (folder / "config.json").write_text(json.dumps(said))
    return found


def reference(weights, head, blocks, hidden: Tensor) -> Tensor:
    for j in range(blocks):
        y = weights[f"{head}.{j}.linear.weight"] @ hidden + weights[f"{head}.{j}.linear.bias"]
        hidden = hidden + y / (1 + torch.exp(-y))
    return weights[f"{head}.{blocks}.weight"] @ hidden


@pytest.mark.parametrize(("blocks", "prefix"), [(1, ""), (2, "medusa_head."), (0, "")])
def test_each_head_says_what_the_reference_says_and_a_tree_is_their_product(tmp_path, target, blocks, prefix):
    weights = save(tmp_path, blocks=blocks, prefix=prefix)
    program = tree_program(target, options=EAGER)
    heads = MedusaHeads(tmp_path, 64, 128, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        cache = program.new_cache(64)
        request = DraftRequest(128, 64, 32, needs_q=True, target=program, cache=cache)
        session = MedusaDraft(program, heads, "medusa").open(request)
        session.read(program.prefill(PROMPT, cache, outputs=("logits", HEAD)))
        session.accept([*PROMPT, 9])
        tree = session.propose(StaticExpansion((3, 2, 1, 1)), Limits(4, 32))
        hidden = target(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0, -1]
        shares = [reference(weights, head, blocks, hidden).softmax(0) for head in range(HEADS)]
    best = [share.topk(3).indices.tolist() for share in shares]
    below = [[node for node, above in enumerate(tree.parents) if above == parent] for parent in range(len(tree))]
    assert [tree.tokens[node] for node in below[0]] == best[0]
    assert all([tree.tokens[node] for node in below[parent]] == best[1][:2] for parent in below[0])
    assert max(tree.depths) == 3, "there are three heads, whatever the policy wants"
    assert len(tree) == 1 + 3 + 6 + 6 and tree.draws is None
    for token, depth, q in zip(tree.tokens[1:], tree.depths[1:], tree.q[1:], strict=True):
        assert q == pytest.approx(float(shares[depth - 1][token]), rel=1e-3)


@pytest.mark.parametrize("policy", ["3,2,1", "best-first:8", "auto"])
def test_the_output_is_the_targets_own(tmp_path, target, policy):
    save(tmp_path)
    given = {"draft": [f"medusa:{tmp_path}", "recycle"], "policy": policy, "max_new_tokens": 20, "options": EAGER}
    out = treespec.generate(target, PROMPT, **given)
    with torch.no_grad():
        wanted = target.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)
    assert out.sequences.tolist() == wanted.tolist() or out.stats.near_ties
    sampled = treespec.generate(target, PROMPT, temperature=0.9, seed=3, **given)
    assert sampled.stats.tokens == 20


@pytest.mark.rare
def test_heads_that_know_the_target_are_accepted(tmp_path):
    """A target whose next token depends on the last one alone, and heads that were made to know it."""
    target = llama(5, vocab=24, hidden=32)
    with torch.no_grad():
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        after = target(torch.arange(24)[:, None]).logits[:, 0].argmax(-1)
        hidden = target.model(torch.arange(24)[:, None]).last_hidden_state[:, 0]
    weights, known, token = {}, torch.linalg.pinv(hidden), after
    for i in range(HEADS):
        token = after[token]  # of the token behind the root's guess, and so on
        weights[f"{i}.0.weight"] = (known @ torch.nn.functional.one_hot(token, 24).float()).T.contiguous()
    save_file(weights, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": HEADS, "medusa_num_layers": 0}))
    given = {"policy": "1,1,1", "max_new_tokens": 21, "options": EAGER}
    out = treespec.generate(target, [1, 2, 3], draft=f"medusa:{tmp_path}", **given)
    assert out.sequences.tolist() == treespec.generate(target, [1, 2, 3], **given).sequences.tolist()
    assert out.stats.tokens_per_step == 4.0


def broken(folder, **changes):
    path = str(folder / "medusa_lm_head.safetensors")
    save_file({**load_file(path), **changes}, path)


MALFORMED = {
    "no number of heads": (lambda f: (f / "config.json").write_text("{}"), "medusa_num_heads"),
    "a head too few": (lambda f: save(f, medusa_num_heads=4), "no tensor 3.0.linear.weight"),
    "a head too many": (lambda f: save(f, medusa_num_heads=2), "no place: 2.0"),
    "no heads": (lambda f: save(f, medusa_num_heads=0), "0 heads"),
    "another width": (lambda f: save(f, width=32), r"\[32, 32\]"),
    "another vocabulary": (lambda f: save(f, vocab=100), r"\[100, 64\]"),
    "whole numbers": (lambda f: broken(f, **{"0.1.weight": torch.ones(128, 64).long()}), "torch.int64"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_folder_that_holds_no_heads_of_this_target(tmp_path, target, name):
    spoil, words = MALFORMED[name]
    save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UnreadableModel, match=words):
        treespec.generate(target, PROMPT, draft=f"medusa:{tmp_path}", max_new_tokens=4, options=EAGER)


def test_what_else_is_refused(tmp_path, target):
    save(tmp_path)
    program = tree_program(target, options=EAGER)
    with pytest.raises(InvalidOption, match="medusa:FOLDER"):
        treespec.generate(target, PROMPT, draft="medusa", max_new_tokens=4, options=EAGER)
    heads = MedusaHeads(tmp_path, 64, 128, torch.float32, torch.device("cpu"))
    with pytest.raises(InvalidOption, match="another model"):
        treespec.generate(
            llama(7), PROMPT, draft=MedusaDraft(program, heads, "medusa"), max_new_tokens=4, options=EAGER
        )
    as_wide = llama(8, vocab=64, hidden=64)  # nothing tells the head's input from the logits
    with pytest.raises(Unsupported, match="as wide"):
        treespec.generate(as_wide, PROMPT[:3], draft=f"medusa:{tmp_path}", max_new_tokens=4, options=EAGER)
