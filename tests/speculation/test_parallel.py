"""Parallel heads: what they say, against a plain reference; that one call says it; folders that hold none."""

from __future__ import annotations

import copy
import functools
import json

import eagle_heads as heads
import pytest
import torch
from enumeration import error, law, outcomes, target_law
from llamas import EAGER, PROMPT, llama
from safetensors.torch import load_file, save_file

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, UnreadableModel
from treespec_compiler.program.tree_program import tree_program
from treespec_compiler.runtime import decoding
from treespec_compiler.speculation.drafts.heads.parallel import LoadedParallel, ParallelDraft
from treespec_compiler.speculation.drafts.protocol import DraftRequest
from treespec_compiler.speculation.policies.protocol import Limits
from treespec_compiler.speculation.policies.static import StaticExpansion

TAPS = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
DEPTH = 3


@pytest.fixture(scope="module")
def target():
    return llama(1, layers=3)


@pytest.fixture(scope="module")
def eager(target):
    """Another instance: a call leaves attributes on the first one, for which it were converted anew."""
    return copy.deepcopy(target)


@pytest.fixture(scope="module")
def small():
    return llama(4, vocab=3, layers=3)


def head(folder, target, depth=DEPTH, draft_vocab=50, **kw):
    """A head for a target, saved; its configuration and tensors."""
    vocab, width = target.get_input_embeddings().weight.shape
    given = {**TAPS, "draft_vocab": draft_vocab, **kw}
    said = {"treespec_head": "parallel", "depth": depth, "follow_rank": 4}
    config = {**heads.configuration(vocab, **given), **said}
    weights = {**heads.tensors(vocab, width, **given), **heads.slots(depth, 4, draft_vocab or vocab)}
    heads.save(folder, config, weights)
    return config, weights


class Heard:
    """A session that was told of a prompt; the rows its children were made of, by path, and calls of its layer."""

    def __init__(self, target, folder, tokens):
        program = tree_program(target, options=EAGER)
        loaded = LoadedParallel.read(folder, program)
        with torch.inference_mode():
            cache = program.new_cache(256)
            request = DraftRequest(program.vocab_size, 256, 64, needs_q=True, target=program, cache=cache)
            self.session = ParallelDraft(program, loaded).open(request)
            self.session.read(program.prefill(tokens[:-1], cache, outputs=("logits", *loaded.layer.reads)))
            self.session.accept(tokens)
        self.rows, self.calls = {}, 0
        children, layer = self.session._children.append, loaded.layer.head.attended

        def append(proposal, nodes, counts, logits):
            for node, row in zip(nodes, logits, strict=True):
                self.rows[tuple(proposal.path_tokens(node))] = row.clone()
            children(proposal, nodes, counts, logits)

        def attended(*given):
            self.calls += 1
            return layer(*given)

        self.session._children.append, loaded.layer.head.attended = append, attended

    def propose(self, policy, depth):
        self.rows.clear()
        with torch.inference_mode():
            return self.session.propose(policy, Limits(depth, 64))


@pytest.mark.parametrize("more", [{}, {"fc_norm": True, "norm_output": True}], ids=["EAGLE-3", "EAGLE-3.1"])
def test_every_row_is_the_references_and_the_layer_runs_once(tmp_path, target, eager, more):
    config, weights = head(tmp_path, target, **more)
    tokens = [*PROMPT, 8]
    heard = Heard(target, tmp_path, tokens)
    proposal = heard.propose(StaticExpansion((3, 2, 2, 1)), 4)
    assert heard.calls == 1 and max(proposal.depths) == DEPTH, "levels behind the last slot are not known"
    with torch.no_grad():
        found = eager(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    hidden = [found[k][0] for k in TAPS["eagle_aux_hidden_state_layer_ids"]]
    assert len(heard.rows) == 1 + 3 + 6
    for path, row in heard.rows.items():
        wanted = heads.reference(config, weights, hidden, tokens, path)
        assert (row.double() - wanted).abs().max() < 1e-3 * wanted.abs().max(), path
    ids = (weights["d2t"] + torch.arange(50)).tolist()
    assert proposal.tokens[1] == ids[int(heard.rows[()].argmax())]
    siblings = [row for path, row in heard.rows.items() if len(path) == 1]
    assert not torch.equal(siblings[0], siblings[1]), "what follows depends on the path"
    # asked again without anything new: the same, and nothing is run
    before = {path: row.clone() for path, row in heard.rows.items()}
    heard.propose(StaticExpansion((3, 2, 2, 1)), 4)
    assert heard.calls == 1 and all(torch.equal(heard.rows[path], row) for path, row in before.items())


def test_accepted_tokens_are_caught_up_with_in_pieces(tmp_path, target, monkeypatch):
    """A prompt that is run in pieces says what it says at once, up to rounding."""
    head(tmp_path, target)
    tokens = [(5 * i + 1) % 128 for i in range(40)]
    whole = Heard(target, tmp_path, tokens)
    whole.propose(StaticExpansion((2, 1)), 2)
    from treespec_compiler.speculation.drafts.heads import parallel

    monkeypatch.setattr(parallel, "profile", lambda device: type("Small", (), {"prompt_chunk": 16}))
    pieces = Heard(target, tmp_path, tokens)
    pieces.propose(StaticExpansion((2, 1)), 2)
    assert pieces.calls == 3 and whole.calls == 1
    for path, row in whole.rows.items():
        torch.testing.assert_close(pieces.rows[path], row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["2,1,1", "best-first:8", "auto"])
def test_the_output_is_the_targets_own(tmp_path, target, policy):
    head(tmp_path, target)
    given = {"policy": policy, "max_new_tokens": 24, "options": EAGER}
    out = treespec.generate(target, PROMPT, draft=[f"parallel:{tmp_path}", "ngram"], **given)
    wanted = treespec.generate(target, PROMPT, max_new_tokens=24, options=EAGER)
    assert out.sequences.tolist() == wanted.sequences.tolist()
    if policy != "auto":
        assert out.stats.nodes_per_step > 1.5


@pytest.mark.parametrize(("verifier", "sampler"), [("recursive", "without-replacement"), ("multi-step", "iid")])
def test_sampled_output_has_the_targets_distribution(tmp_path, small, monkeypatch, verifier, sampler):
    """Every outcome of every choice, of a head that has no row for one of the three tokens."""
    head(tmp_path, small, draft_vocab=2)
    prompt, hot = [1, 2], {"temperature": 0.8, "verifier": verifier, "sampler": sampler, "eos_token_id": ()}

    def run(chance):
        monkeypatch.setattr(decoding, "SeededChance", lambda seed: chance)
        given = {"policy": (2, 1), "max_new_tokens": 3, "seed": 0, "options": EAGER}
        out = treespec.generate(small, prompt, draft=f"parallel:{tmp_path}", **given, **hot)
        return tuple(out.sequences[0, len(prompt) :].tolist())

    eager = copy.deepcopy(small)

    @functools.cache
    def truth(path):
        with torch.no_grad():
            return (eager(torch.tensor([[*prompt, *path]])).logits[0, -1].double() / 0.8).softmax(-1).numpy()

    assert error(law(outcomes(run)), target_law(truth, 3)) < 1e-5


def said(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder, name):
    path = str(folder / "model.safetensors")
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)


MALFORMED = {
    "an EAGLE-3 head": (lambda f: said(f, treespec_head=None), "a parallel head"),
    "no depth": (lambda f: said(f, depth=None), "depth and follow_rank"),
    "no levels": (lambda f: said(f, depth=0), "0 levels"),
    "a slot too few": (lambda f: said(f, depth=5), r"slots.embedding \[2, 24\]"),
    "another rank": (lambda f: said(f, follow_rank=3), r"follow.down.weight \[4, 24\]"),
    "no slots": (lambda f: without(f, "slots.state"), "no tensor slots.state"),
    "another width": (lambda f: said(f, hidden_size=16), "by config.json"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_folder_that_holds_no_such_head(tmp_path, target, name):
    spoil, words = MALFORMED[name]
    head(tmp_path, target)
    spoil(tmp_path)
    with pytest.raises(UnreadableModel, match=words):
        treespec.generate(target, PROMPT, draft=f"parallel:{tmp_path}", max_new_tokens=4, options=EAGER)


def test_what_else_is_refused(tmp_path, target):
    head(tmp_path, target)
    with pytest.raises(InvalidOption, match="parallel:FOLDER"):
        treespec.generate(target, PROMPT, draft="parallel", max_new_tokens=4, options=EAGER)
    with pytest.raises(UnreadableModel, match="no place: "):
        treespec.generate(target, PROMPT, draft=f"eagle3:{tmp_path}", max_new_tokens=4, options=EAGER)
    program = tree_program(target, options=EAGER)
    draft = ParallelDraft(program, LoadedParallel.read(tmp_path, program))
    assert draft.latency().points[0].seconds > 0
    with pytest.raises(InvalidOption, match="another model"):
        draft.open(DraftRequest(128, 64, 8, target=object()))
