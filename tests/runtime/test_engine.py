"""Requests yield work: what they want of one program and cache is run together, and results go to whom they belong."""

from __future__ import annotations

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import DraftFailed, InvalidLogits, ModelFailed
from treespec_compiler.runtime.decoding import appoint
from treespec_compiler.runtime.engine import Engine
from treespec_compiler.runtime.request import Ending, Request
from treespec_compiler.runtime.stats import Stats
from treespec_compiler.speculation import slots
from treespec_compiler.speculation.drafts.model import ModelDraft
from treespec_compiler.speculation.proposal import Proposal
from treespec_compiler.speculation.sampling.settings import Sampling
from treespec_compiler.speculation.work import Nodes
from treespec_compiler.tree import TokenTree

VOCAB = 40
ROW = table_row(VOCAB, seed=1)
POLICY = treespec.StaticExpansion((2, 1))
PROMPTS = ([3, 1, 4], [1, 5, 9, 2, 6], [5])


def request(program, prompt, count: int = 20, drafts=(), eos=frozenset()) -> Request:
    judge, _ = appoint(Sampling(), None, None, POLICY, drafts=len(drafts))
    return Request(program, prompt, Ending(count, frozenset(eos), frozenset()), drafts, POLICY, judge, Stats())


def run(engine: Engine, requests: list[Request]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {id(r): [] for r in requests}
    while any(r.stats.finish_reason is None for r in requests):
        for ended, step in engine.step():
            if isinstance(step, Exception):
                raise step
            tokens[id(ended)] += step.tokens
    return tokens


def test_requests_on_slots_of_one_cache_are_run_in_one_forest():
    target, small = FakeProgram(ROW, VOCAB), FakeProgram(ROW, VOCAB)
    forests: list[int] = []
    extend = target.extend
    target.extend = lambda forest, *rest: forests.append(len(forest.items)) or extend(forest, *rest)
    slots.share(target, 100, 3)
    slots.share(small, 100, 3)
    engine, draft = Engine(), ModelDraft(small)
    requests = [request(target, prompt, drafts=[draft]) for prompt in PROMPTS]
    for r in requests:
        engine.add(r)
    tokens = run(engine, requests)
    for r, prompt in zip(requests, PROMPTS, strict=True):
        assert [*prompt, *tokens[id(r)]] == greedy(ROW, prompt, 20)
    assert len(target.caches) == 1 and len(small.caches) == 1
    assert max(forests) == 3  # all three trees in one call
    assert target.caches[0].prefix == [[], [], []] == small.caches[0].prefix


def test_a_request_that_fails_leaves_the_others_alone():
    def row(tokens):
        return ROW(tokens) if tokens[0] != 5 else torch.full((VOCAB,), float("nan"))

    target = FakeProgram(row, VOCAB)
    slots.share(target, 100, 3)
    engine = Engine()
    requests = [request(target, prompt) for prompt in PROMPTS]
    for r in requests:
        engine.add(r)
    (first, second, (failed, error)) = engine.step()
    assert failed is requests[2] and isinstance(error, InvalidLogits)
    tokens = run(engine, requests[:2])
    for (r, step), prompt in zip((first, second), PROMPTS, strict=False):
        assert [*prompt, *step.tokens, *tokens[id(r)]] == greedy(ROW, prompt, 20)
    assert target.caches[0].prefix == [[], [], []]


def test_a_request_that_joins_later_and_one_that_is_removed():
    target = FakeProgram(ROW, VOCAB)
    slots.share(target, 100, 2)
    engine = Engine()
    first, second = request(target, PROMPTS[0]), request(target, PROMPTS[1])
    engine.add(first)
    engine.step(), engine.step()
    engine.add(second)
    engine.step()
    engine.remove(first)
    assert target.caches[0].prefix[first.slot.index] == []
    rest = run(engine, [second])
    assert greedy(ROW, PROMPTS[1], 20)[-len(rest[id(second)]) :] == rest[id(second)]


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
        slot = slots.take(small, 200)
        logits = yield Nodes(slot, TokenTree.chain(session.seen))
        token = int(logits[-1].argmax())
        slots.give_back(slot)
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
def test_the_plain_loop_names_an_error_of_the_models_own(prompt, count):
    with pytest.raises(ModelFailed, match=r"The model itself failed on .* tokens: got IndexError"):
        treespec.generate(Foreign("tensor").eval(), prompt, max_new_tokens=count, on_unsupported="fallback")
