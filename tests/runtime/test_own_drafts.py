"""Drafts of a user's own may yield work, and what they raise stays what it is; models that run in the plain loop."""

from __future__ import annotations

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import DraftFailed, ModelFailed
from treespec_compiler.speculation.proposal import Proposal
from treespec_compiler.speculation.slots import KEPT
from treespec_compiler.speculation.work import Nodes
from treespec_compiler.tree import TokenTree

VOCAB = 40
ROW = table_row(VOCAB, seed=1)
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])


class Own:
    """A draft of the user's own, of one method."""

    name, prefill_seconds, compile_seconds = "own", 0.0, 0.0

    def __init__(self, propose, accept=lambda seen, tokens: None):
        self.propose, self.accept = propose, accept

    def open(self, request):
        draft = self

        class Session:
            def __init__(self):
                self.seen: list[int] = []
                self.slot = None

            def propose(self, policy, limits):
                return draft.propose(self, policy, limits)

            def accept(self, tokens):
                self.seen += tokens
                draft.accept(self.seen, tokens)

            def close(self):
                pass

        return Session()


def test_a_draft_of_ones_own_may_yield_its_work():
    small = FakeProgram(ROW, VOCAB)

    def propose(session, policy, limits):
        slot = KEPT.take(small, 200)
        logits = yield Nodes(slot, TokenTree.chain(session.seen))
        token = int(logits[-1].argmax())
        KEPT.give_back(slot)
        return Proposal([session.seen[-1], token], [-1, 0], [0, 1], [0, 0], proposer="own")

    out = treespec.generate(FakeProgram(ROW, VOCAB), PROMPTS[0], draft=Own(propose), policy="1", max_new_tokens=21)
    assert out.sequences.tolist() == [greedy(ROW, PROMPTS[0], 21)]
    assert out.stats.tokens_per_step == 2.0


@pytest.mark.parametrize("kind", ["plain", "generator", "accept"])
def test_a_stop_iteration_of_a_draft_does_not_end_the_output_in_silence(kind):
    def leak(*_):
        return next(iter(()))

    def generator(*_):
        next(iter(()))
        yield

    def root(session, policy, limits):
        return Proposal.root(session.seen[-1])

    draft = {"plain": Own(leak), "generator": Own(generator), "accept": Own(root, leak)}[kind]
    program = FakeProgram(ROW, VOCAB)
    with pytest.raises(DraftFailed, match=r"The draft 'own' failed: got a StopIteration out of its `(propose|accept)`"):
        treespec.generate(program, PROMPTS[0], draft=draft, policy="1,1", max_new_tokens=24)
    assert program.caches[0].length() == 0


def test_an_error_of_a_draft_stays_what_it_is():
    def broken(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        treespec.generate(FakeProgram(ROW, VOCAB), PROMPTS[0], draft=Own(broken), policy="1,1")


class Foreign(nn.Module):
    """Not to be converted; logits of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table, self.places = nn.Embedding(VOCAB, 8), nn.Embedding(16, 8)
        self.mix, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, VOCAB)

    def forward(self, ids):
        x = self.head(self.mix(self.table(ids) + self.places(torch.arange(ids.shape[1])))[0])
        forms = {
            "tensor": x,
            "tuple": (x, None),
            "dict": {"logits": x},
            "2d": x[0],
            "last": x[:, -1],
            "last 3d": x[:, -1:],
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "2d", "last", "last 3d"])
def test_the_plain_loop_reads_logits_of_any_form(form):
    torch.manual_seed(0)
    model = Foreign(form).eval()
    ids = [1, 2, 3]
    for _ in range(8):
        with torch.no_grad():
            x = model.mix(model.table(torch.tensor([ids])) + model.places(torch.arange(len(ids))))[0]
            ids = [*ids, int(model.head(x)[0, -1].argmax())]
    out = treespec.generate(model, [1, 2, 3], max_new_tokens=8, on_unsupported="fallback")
    assert out.sequences.tolist() == [ids] and out.stats.fallback and out.stats.steps == 7


@pytest.mark.parametrize(("prompt", "count"), [([1, 99], 3), ([1, 2], 60)])
@pytest.mark.family
def test_the_plain_loop_names_an_error_of_the_models_own(prompt, count):
    with pytest.raises(ModelFailed, match=r"The model itself failed on .* tokens: got IndexError"):
        treespec.generate(Foreign("tensor").eval(), prompt, max_new_tokens=count, on_unsupported="fallback")
