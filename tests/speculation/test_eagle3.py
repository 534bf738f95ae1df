"""EAGLE-3 heads: what they say, against a plain reference; what they read of the target; folders that hold none."""

from __future__ import annotations

import functools
import json
import pickle

import eagle_heads as heads
import pytest
import torch
from enumeration import error, law, outcomes, target_law
from llamas import EAGER, PROMPT, llama
from safetensors.torch import load_file, save_file
from zoo import VOCAB, make

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, UnreadableModel
from treespec_compiler.program.tree_program import tree_program
from treespec_compiler.runtime import decoding
from treespec_compiler.speculation.drafts.heads.draft import HeadDraft
from treespec_compiler.speculation.drafts.heads.loaded import LoadedHead
from treespec_compiler.speculation.drafts.protocol import DraftRequest
from treespec_compiler.speculation.policies.protocol import Limits
from treespec_compiler.speculation.policies.static import StaticExpansion

TAPS = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
KINDS = {
    "EAGLE-3": {},
    "fewer ids": {"draft_vocab": 50},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True, "draft_vocab": 50},
    "one norm": {"norm_before_fc": True, "norm_before_residual": True},
}


@pytest.fixture(scope="module")
def target():
    return llama(1, layers=3)


def head(folder, target, layout="midlayer", packaged=False, width=None, **kw):
    """A head for a target, saved; its configuration and tensors."""
    vocab = target.get_input_embeddings().weight.shape[0]
    width = width or target.config.hidden_size
    config, weights = heads.configuration(vocab, **{**TAPS, **kw}), heads.tensors(vocab, width, **{**TAPS, **kw})
    heads.save(folder, heads.speculators(config) if packaged else config, weights, layout)
    return config, weights


def states(target, tokens):
    """The target's hidden states [n, D], from Hugging Face; the last one is behind its norm, and of no use."""
    with torch.no_grad():
        return [h[0] for h in target(torch.tensor([tokens]), output_hidden_states=True).hidden_states]


class Told:
    """A session that was told of a target's tokens, and what it proposes."""

    def __init__(self, target, folder):
        self.program = tree_program(target, options=EAGER)
        self.loaded = LoadedHead.read(folder, self.program)
        self.draft = HeadDraft(self.program, self.loaded)
        self.cache = self.program.new_cache(256)
        request = DraftRequest(self.program.vocab_size, 256, 32, target=self.program, cache=self.cache)
        self.session = self.draft.open(request)
        self.rows = {}
        own = self.session._children.append

        def append(proposal, nodes, counts, logits):
            for node, row in zip(nodes, logits, strict=True):
                self.rows[tuple(proposal.path_tokens(node))] = row.clone()
            own(proposal, nodes, counts, logits)

        self.session._children.append = append

    @torch.inference_mode()
    def prompt(self, tokens, following):
        answer = self.program.prefill(tokens, self.cache, outputs=("logits", *self.loaded.reads))
        self.session.read(answer)
        self.session.accept([*tokens, following])

    @torch.inference_mode()
    def propose(self, widths):
        self.rows.clear()
        return self.session.propose(StaticExpansion(widths), Limits(len(widths), 32))

    @torch.inference_mode()
    def step(self, tree, path, bonus):
        found = self.program.verify(tree, self.cache, outputs=("logits", *self.loaded.reads))
        self.cache.commit(path)
        self.session.read({name: found[name][path] for name in self.loaded.reads})
        self.session.accept([*(tree.tokens[node] for node in path[1:]), bonus])


def check(told, target, config, weights, tokens, least):
    """Each row of the last proposal, against the reference on the eager model's own hidden states."""
    hidden = [states(target, tokens[:-1])[k] for k in config["eagle_aux_hidden_state_layer_ids"]]
    assert len(told.rows) >= least
    for path, row in told.rows.items():
        wanted = heads.reference(config, weights, hidden, tokens, path)
        assert (row.double() - wanted).abs().max() < 1e-3 * wanted.abs().max(), path


@pytest.mark.parametrize(("layout", "packaged"), [("midlayer", False), ("layers.0", True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.family
def test_every_row_is_the_references(tmp_path, target, kind, packaged, layout):
    config, weights = head(tmp_path, target, layout, packaged, **KINDS[kind])
    told = Told(target, tmp_path)
    told.prompt(PROMPT, 8)
    tokens = [*PROMPT, 8]
    proposal = told.propose((2, 2, 1))
    check(told, target, config, weights, tokens, 7)
    ids = (weights["d2t"] + torch.arange(50)).tolist() if "d2t" in weights else range(128)
    assert set(proposal.tokens[1:]) <= set(ids)
    best = ids[int(told.rows[()].argmax())]
    assert proposal.tokens[1] == best
    # two nodes of the tree are accepted; then a step that proposes nothing, and another
    child = proposal.parents.index(1)
    told.step(proposal.tree(), [0, 1, child], 9)
    tokens += [proposal.tokens[1], proposal.tokens[child], 9]
    told.step(treespec.TokenTree.chain([9]), [0], 11)
    tokens += [11]
    told.propose((1, 1, 1, 1))
    check(told, target, config, weights, tokens, 4)
    # asked again without anything new: the same
    before = {path: row.clone() for path, row in told.rows.items()}
    told.propose((1, 1, 1, 1))
    assert all(torch.equal(told.rows[path], row) for path, row in before.items())


@pytest.mark.parametrize("name", ["gpt2", "gemma", "mistral", "falcon", "phi3"])
@pytest.mark.family
def test_any_decoder_has_the_states_that_a_head_reads(tmp_path, name):
    target = make(name)
    tokens = [token % (VOCAB - 1) for token in PROMPT]
    width = states(target, tokens)[0].shape[-1]
    config, weights = head(tmp_path, target, width=width, eagle_aux_hidden_state_layer_ids=[0, 1])
    told = Told(target, tmp_path)
    told.prompt(tokens, 8)
    told.propose((2, 1))
    check(told, target, config, weights, [*tokens, 8], 3)


@pytest.mark.rare
def test_low_middle_and_high_states_are_read_where_nothing_is_said(tmp_path):
    target = llama(2, layers=8, hidden=32)
    config, weights = head(tmp_path, target)
    del config["eagle_aux_hidden_state_layer_ids"]
    heads.save(tmp_path, config, weights)
    assert LoadedHead.read(tmp_path, tree_program(target, options=EAGER)).reads == ("hidden:2", "hidden:4", "hidden:5")


@pytest.mark.rare
def test_a_head_without_an_embedding_reads_the_targets(tmp_path):
    target = llama(3, layers=3, hidden=heads.HIDDEN)
    config, weights = head(tmp_path, target)
    weights["embed_tokens.weight"] = target.get_input_embeddings().weight.detach()
    heads.save(tmp_path, config, {k: v for k, v in weights.items() if k != "embed_tokens.weight"})
    told = Told(target, tmp_path)
    told.prompt(PROMPT, 8)
    told.propose((2, 1))
    check(told, target, config, weights, [*PROMPT, 8], 3)


@pytest.mark.parametrize("policy", ["2,1,1", "best-first:8", "equal-growth:2,3", "auto"])
@pytest.mark.parametrize("beside", [(), ("ngram", "recycle")])
def test_the_output_is_the_targets_own(tmp_path, target, policy, beside):
    head(tmp_path, target, **KINDS["fewer ids"])
    out = treespec.generate(
        target, PROMPT, draft=[f"eagle3:{tmp_path}", *beside], policy=policy, max_new_tokens=24, options=EAGER
    )
    with torch.no_grad():
        wanted = target.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    assert out.sequences.tolist() == wanted.tolist() or out.stats.near_ties
    again = treespec.generate(
        target, PROMPT, draft=f"eagle3:{tmp_path}", policy=policy, max_new_tokens=24, options=EAGER
    )
    assert again.sequences.tolist() == out.sequences.tolist()
    if policy != "auto":
        assert again.stats.nodes_per_step > 1.5


@pytest.mark.parametrize(("verifier", "sampler"), [("recursive", "without-replacement"), ("multi-step", "iid")])
@pytest.mark.family
def test_sampled_output_has_the_targets_distribution(tmp_path, monkeypatch, verifier, sampler):
    """Every outcome of every choice, of a head that has no row for one of the three tokens."""
    small = llama(4, vocab=3, layers=3)
    head(tmp_path, small, draft_vocab=2)
    prompt, hot = [1, 2], {"temperature": 0.8, "verifier": verifier, "sampler": sampler, "eos_token_id": ()}

    def run(chance):
        monkeypatch.setattr(decoding, "SeededChance", lambda seed: chance)
        draft = f"eagle3:{tmp_path}"
        out = treespec.generate(small, prompt, draft=draft, policy=(2,), max_new_tokens=3, seed=0, options=EAGER, **hot)
        return tuple(out.sequences[0, len(prompt) :].tolist())

    @functools.cache
    def truth(path):
        with torch.no_grad():
            return (small(torch.tensor([[*prompt, *path]])).logits[0, -1].double() / 0.8).softmax(-1).numpy()

    assert error(law(outcomes(run)), target_law(truth, 3)) < 1e-5


MALFORMED = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config.json that is no JSON": (lambda f: (f / "config.json").write_text("{"), "JSONDecodeError"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "no file of tensors"),
    "a missing tensor": (lambda f: without(f, "fc.weight"), "no tensor fc.weight"),
    "a tensor too many": (lambda f: rewritten(f, extra=torch.zeros(3)), "no place: extra"),
    "another hidden size": (lambda f: said(f, hidden_size=16), "by config.json"),
    "a head for another width": (lambda f: said(f, target_hidden_size=48), "for hidden states of 48"),
    "another vocabulary": (lambda f: said(f, vocab_size=64), r"below 64|for 64 ids|\[64"),
    "other layers": (lambda f: said(f, eagle_aux_hidden_state_layer_ids=[0, 1, 9]), "from 0 to 3"),
    "another kind of speculator": (lambda f: said(f, speculators_model_type="medusa"), "type 'medusa'"),
    "two layers": (lambda f: said(f, num_hidden_layers=2), "one layer with silu"),
    "angles by length": (lambda f: said(f, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "kind 'dynamic'"),
    "a pickle": (lambda f: pickled(f), "UnpicklingError"),
    "ids that are twice there": (lambda f: rewritten(f, d2t=-torch.arange(50)), "twice there"),
    "whole numbers for weights": (lambda f: rewritten(f, **{"norm.weight": torch.ones(24).long()}), "torch.int64"),
    "two tables of ids": (lambda f: rewritten(f, t2d=torch.zeros(128, dtype=torch.bool)), "contradicts"),
}


def said(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewritten(folder, **tensors):
    path = str(folder / "model.safetensors")
    save_file({**load_file(path), **tensors}, path)


def without(folder, name):
    path = str(folder / "model.safetensors")
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)


class Harmful:
    def __reduce__(self):
        return print, ("code that a file has brought",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Harmful()}))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_folder_that_holds_no_head_of_this_target(tmp_path, target, name, capsys):
    spoil, words = MALFORMED[name]
    head(tmp_path, target, **KINDS["fewer ids"])
    spoil(tmp_path)
    with pytest.raises(UnreadableModel, match=words) as info:
        treespec.generate(target, PROMPT, draft=f"eagle3:{tmp_path}", max_new_tokens=4, options=EAGER)
    assert "expected" in str(info.value) and not capsys.readouterr().out


def test_a_folder_of_tensors_alone_may_be_a_pytorch_file(tmp_path, target):
    head(tmp_path, target)
    weights = load_file(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert LoadedHead.read(tmp_path, tree_program(target, options=EAGER)).head.shape.draft_vocab == 128


def test_the_name_says_a_folder(target):
    with pytest.raises(InvalidOption, match="eagle3:FOLDER"):
        treespec.generate(target, PROMPT, draft="eagle3", max_new_tokens=4, options=EAGER)


@pytest.mark.rare
def test_a_head_of_another_target_is_refused(tmp_path, target):
    head(tmp_path, target)
    program = tree_program(target, options=EAGER)
    draft = HeadDraft(program, LoadedHead.read(tmp_path, program))
    with pytest.raises(InvalidOption, match="another model"):
        treespec.generate(llama(7, layers=3), PROMPT, draft=draft, max_new_tokens=4, options=EAGER)


def test_requests_of_an_engine_have_heads_of_their_own(tmp_path, target):
    head(tmp_path, target, **KINDS["fewer ids"])
    prompts = [PROMPT, [*PROMPT, 3, 4], [9, 8, 7]]
    alone = {"draft": f"eagle3:{tmp_path}", "policy": "2,1", "max_new_tokens": 12, "options": EAGER}
    wanted = [treespec.generate(target, prompt, **alone).sequences.tolist()[0] for prompt in prompts]
    found = treespec.generate(target, prompts, **alone)
    assert [out.sequences.tolist()[0] for out in found] == wanted
    assert found.stats.nodes_per_step > 1.5
