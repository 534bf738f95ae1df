"""`generate` and `stream` against the target's own greedy loop, on stand-in programs that check the cache contract."""

from __future__ import annotations

import inspect

import pytest
import torch
from fake_program import FakeProgram, greedy, table_row

import treespec_compiler as treespec
from treespec_compiler.errors import (
    ContextOverflow,
    InvalidOption,
    InvalidPrompt,
    TokenizerMismatch,
    TokenOutOfRange,
    TreespecError,
)
from treespec_compiler.speculation.drafts.model import ModelDraft

VOCAB = 40
TARGET = table_row(VOCAB, seed=1)
PROMPT = [3, 1, 4, 1, 5]
NO_EOS = {"eos_token_id": ()}


def target(**kw) -> FakeProgram:
    return FakeProgram(TARGET, VOCAB, **kw)


def partial(agreement: float, vocab: int = VOCAB, **kw) -> FakeProgram:
    return FakeProgram(table_row(vocab, seed=2, agree_with=TARGET, agreement=agreement), vocab, **kw)


DRAFTS = {
    "perfect": lambda: FakeProgram(TARGET, VOCAB),
    "random": lambda: partial(0.0),
    "partial": lambda: partial(0.7),
    "smaller vocabulary": lambda: partial(0.7, vocab=VOCAB - 13),
    "larger vocabulary": lambda: partial(0.7, vocab=VOCAB + 31),
    "same program": None,
    "two drafts": lambda: [partial(0.6), FakeProgram(table_row(VOCAB, 3, agree_with=TARGET, agreement=0.5), VOCAB)],
}


def check_caches(*programs: FakeProgram) -> None:
    """Every slot was freed, and one cache was enough."""
    for program in programs:
        assert all(cache.length() == 0 and cache.tree[0] is None for cache in program.caches)


@pytest.mark.parametrize("expansion", [(1,), (1, 1, 3), (4, 2, 1), (3, 3, 3, 3), (1, 1, 1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", DRAFTS)
def test_same_ids_as_the_targets_own_greedy_loop(name, expansion):
    program = target()
    draft = program if DRAFTS[name] is None else DRAFTS[name]()
    policy = treespec.StaticExpansion(expansion)
    out = treespec.generate(program, torch.tensor([PROMPT]), draft=draft, max_new_tokens=61, policy=policy)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 61)]
    assert out.sequences.dtype == torch.int64
    stats = out.stats
    assert stats.finish_reason == "length"
    assert stats.tokens == 61 == 1 + stats.step_tokens == 1 + stats.accepted + stats.steps
    assert sum(count.accepted for count in stats.accepted_by_depth) == stats.accepted
    assert sum(count.accepted for count in stats.accepted_by_rank) == stats.accepted
    assert stats.nodes == stats.steps + sum(count.proposed for count in stats.accepted_by_depth)
    verified = [n for kind, n in program.caches[0].calls if kind == "verify"]
    assert stats.nodes == sum(verified) and stats.steps == len(verified)
    for counts in (stats.accepted_by_depth, stats.accepted_by_rank):
        assert all(count.accepted <= count.tried <= count.proposed for count in counts)
    if name in ("perfect", "same program"):
        assert stats.tokens_per_step >= min(60, len(expansion) + 1) * 0.9
        assert stats.accepted_by_rank[0].rate == 1.0
    if name in ("partial", "larger vocabulary", "two drafts"):
        assert stats.tokens_per_step > 1.3
    check_caches(program)


def test_without_a_draft_every_step_is_one_node():
    program = target()
    out = treespec.generate(program, PROMPT, max_new_tokens=20)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 20)]
    assert program.calls == [("prefill", 5)] + [("verify", 1)] * 19
    assert out.stats.tokens_per_step == 1.0 and out.stats.nodes_per_step == 1.0


def test_one_token_prompt_and_one_new_token():
    for count in (1, 2, 3):
        out = treespec.generate(target(), [7], draft=partial(0.8), max_new_tokens=count)
        assert out.sequences.tolist() == [greedy(TARGET, [7], count)]


@pytest.mark.parametrize("count", range(1, 12))
def test_max_new_tokens_inside_a_tree_proposes_no_more_than_is_wanted(count):
    program = target()
    out = treespec.generate(program, PROMPT, draft=target(), max_new_tokens=count, policy=(1, 1, 1, 1))
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, count)]
    assert out.stats.finish_reason == "length"
    # a perfect chain draft: no node was verified in vain
    assert out.stats.nodes == out.stats.step_tokens


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("kind", ["eos", "stop"])
def test_an_end_token_inside_a_tree_is_kept_and_ends(kind, at):
    new = greedy(TARGET, PROMPT, 40)[5:]
    end = new[at]
    first = new.index(end)
    ends = {"eos_token_id": [end, VOCAB - 1]} if kind == "eos" else {"stop_ids": [end], "eos_token_id": ()}
    if VOCAB - 1 in new[:first]:
        ends.pop("eos_token_id")
    program, draft = target(), target()
    steps = list(s := treespec.stream(program, PROMPT, draft=draft, max_new_tokens=40, policy=(2, 1, 1), **ends))
    assert s.tokens == new[: first + 1]
    assert s.stats.finish_reason == kind
    assert s.stats.tokens == first + 1 == 1 + s.stats.step_tokens
    assert sum(count.accepted for count in s.stats.accepted_by_depth) == s.stats.accepted
    last = steps[-1]
    assert last.tokens[-1] == end
    assert last.accepted == len(last.tokens) - (last.bonus is not None)
    check_caches(program, draft)


def test_stop_wins_over_length_on_the_last_token():
    new = greedy(TARGET, PROMPT, 10)[5:]
    count = max(i for i, token in enumerate(new) if token not in new[:i]) + 1
    out = treespec.generate(target(), PROMPT, draft=target(), max_new_tokens=count, stop_ids=[new[count - 1]])
    assert out.stats.finish_reason == "stop" and out.stats.tokens == count


@pytest.mark.parametrize("limit", range(5, 24))
def test_the_context_ends_the_output_and_nothing_overflows(limit):
    program = target(max_context=limit)
    out = treespec.generate(program, PROMPT, draft=partial(0.9), max_new_tokens=50, policy=(2, 2, 2))
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, limit - 5)]
    assert out.stats.finish_reason == "context"


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 9, 17])
def test_a_draft_with_a_shorter_context_drops_out(limit):
    program = target()
    out = treespec.generate(program, PROMPT, draft=partial(0.9, max_context=limit), max_new_tokens=30)
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 30)]


def test_stream_gives_the_steps_of_generate():
    out = treespec.generate(target(), PROMPT, draft=partial(0.7), max_new_tokens=50)
    program = target()
    s = treespec.stream(program, PROMPT, draft=partial(0.7), max_new_tokens=50)
    tokens: list[int] = []
    for index, step in enumerate(s):
        if index == 0:
            assert step.tree is None and step.accepted == 0 and step.bonus == step.tokens[0]
        else:
            assert step.tree is not None
            assert step.tree.tokens[0] == tokens[-1]
            assert [step.tree.tokens[node] for node in step.path] == [tokens[-1], *step.tokens[: step.accepted]]
            assert step.tree.path(step.path[-1]) == step.path
            assert step.tokens[step.accepted :] == [step.bonus]
        tokens += step.tokens
    assert torch.equal(s.sequences, out.sequences)
    assert s.stats.steps == out.stats.steps == index


def test_a_stream_that_is_left_early_frees_its_caches():
    program, draft = target(), partial(0.7)
    with treespec.stream(program, PROMPT, draft=draft) as s:
        next(s), next(s)
        assert program.caches[0].length() > 0
    check_caches(program, draft)
    assert next(s, None) is None


def test_two_targets_and_two_streams_of_one_target_do_not_mix():
    other_row = table_row(VOCAB, seed=9)
    one, other = target(), FakeProgram(other_row, VOCAB)
    draft = partial(0.6)
    streams = [
        (treespec.stream(one, PROMPT, draft=draft, max_new_tokens=30), TARGET, PROMPT),
        (treespec.stream(other, PROMPT, draft=draft, max_new_tokens=30), other_row, PROMPT),
        (treespec.stream(one, [9, 8], draft=draft, max_new_tokens=30), TARGET, [9, 8]),
    ]
    for _ in range(31):
        for s, _, _ in streams:
            next(s, None)
    for s, row, prompt in streams:
        assert s.sequences.tolist() == [greedy(row, prompt, 30)]


def test_caches_are_used_again_and_replaced_when_stale_or_too_small():
    program, draft = target(), partial(0.5)
    for _ in range(3):
        treespec.generate(program, PROMPT, draft=draft, max_new_tokens=10)
    assert len(program.caches) == 1 and len(draft.caches) == 1
    program.caches[0].stale = True
    treespec.generate(program, PROMPT, draft=draft, max_new_tokens=10)
    assert len(program.caches) == 2
    out = treespec.generate(program, PROMPT, draft=draft, max_new_tokens=400)
    assert len(program.caches) == 3
    assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 400)]


def test_the_draft_catches_up_what_it_never_ran():
    draft = target()
    treespec.generate(target(), PROMPT, draft=draft, max_new_tokens=9, policy=(1, 1))
    # prompt; root, level 1; then the accepted last level and the new root together, level 1; ...
    assert draft.calls == [("prefill", 5), ("verify", 1), ("extend", 1), ("verify", 2), ("extend", 1), ("verify", 2)]


def test_max_new_tokens_of_one_never_touches_the_draft():
    draft = target()
    treespec.generate(target(), PROMPT, draft=draft, max_new_tokens=2)
    assert draft.calls == [] and draft.caches == []


def test_stats_read_well_and_serialize():
    import json

    out = treespec.generate(target(), PROMPT, draft=partial(0.7), max_new_tokens=30)
    assert "bonus token included" in str(out.stats)
    data = json.loads(json.dumps(out.stats.as_dict()))
    assert data["tokens"] == 30 and data["tokens_per_step"] > 1
    assert data["accepted_by_depth"][0].keys() == {"proposed", "tried", "accepted"}
    parts = ("draft_seconds", "verify_seconds", "commit_seconds", "overhead_seconds")
    assert sum(data[part] for part in parts) == pytest.approx(data["step_seconds"], abs=1e-6)


def test_near_ties_are_counted_in_low_precision_only():
    def flat(tokens):
        row = torch.zeros(VOCAB)
        row[sum(tokens) % VOCAB] = 1e-3
        return row + 1.0

    program = FakeProgram(flat, VOCAB)
    assert treespec.generate(program, PROMPT, max_new_tokens=10).stats.near_ties == 0
    program.dtype = torch.bfloat16
    assert treespec.generate(program, PROMPT, max_new_tokens=10).stats.near_ties == 9


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], InvalidPrompt, "got no ids, expected at least one"),
        (torch.zeros(1, 0, dtype=torch.int64), InvalidPrompt, "got no ids"),
        ([[1, 2], 3], InvalidPrompt, "a list of ids or a list of prompts, not both"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), InvalidPrompt, "shape [1, 1, 3]"),
        (torch.zeros(3), InvalidPrompt, "dtype torch.float32, expected torch.int64"),
        ("hello", InvalidPrompt, "got a str, expected token ids"),
        ([1, 2.5], InvalidPrompt, "got 2.5 (float) at index 1"),
        ([1, -2], InvalidPrompt, "the id -2 at index 1"),
        ([1, VOCAB], TokenOutOfRange, "got 40 at index 1 of the prompt, expected 0 to 39"),
        ([1] * 65, ContextOverflow, "position 64, expected positions below 64"),
    ],
)
def test_bad_prompts(prompt, error, text):
    program = target(max_context=64)
    with pytest.raises(error) as caught:
        treespec.stream(program, prompt)  # before the first step
    assert text in str(caught.value)
    assert program.caches == [] and program.calls == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"temperature": -0.7}, "Invalid option temperature: got -0.7, expected a finite number of 0 or more"),
        ({"max_new_tokens": 0}, "Invalid option max_new_tokens: got 0, expected a positive integer"),
        ({"policy": "1,x"}, "Invalid option expansion: got '1,x', expected one positive integer a level"),
        ({"policy": (1, 0)}, "Invalid option expansion: got (1, 0)"),
        ({"policy": 3.5}, "Invalid option policy: got 3.5, expected a TreePolicy"),
        ({"verifier": "gredy"}, "Invalid option verifier: got 'gredy', expected one of 'greedy', 'naive'"),
        ({"draft": 3}, "Invalid option draft: got 'int', expected a module, a TreeProgram, a Draft, a list"),
        ({"stop_ids": ["x"]}, "Invalid option stop_ids: got ['x'], expected integer ids"),
        ({"eos_token_id": 1.5}, "Invalid option eos_token_id: got 1.5"),
        ({"on_unsupported": "ignore"}, "Invalid option on_unsupported: got 'ignore', expected 'raise' or 'fallback'"),
        ({"options": {"lowring": "eager"}}, "Did you mean 'lowering'?"),
    ],
)
def test_bad_arguments(arguments, text):
    program = target()
    with pytest.raises(TreespecError) as caught:
        treespec.stream(program, PROMPT, **arguments)
    assert text in str(caught.value)
    assert program.caches == []


def test_a_model_must_be_a_module_or_a_program():
    with pytest.raises(InvalidOption, match=r"Invalid option model: got 'str', expected an nn.Module or a TreeProgram"):
        treespec.generate("gpt2", PROMPT)


def test_different_tokenizers_are_refused():
    same = {"a": 0, "b": 1, "c": 2}
    treespec.stream(target(), PROMPT, draft=target(), tokenizer=same, draft_tokenizer={"a": 0, "b": 1})
    with pytest.raises(TokenizerMismatch) as caught:
        treespec.stream(
            target(), PROMPT, draft=target(), tokenizer=same, draft_tokenizer={"a": 0, "c": 1, "b": 2, "d": 3}
        )
    assert "id 1 = 'b' in the target and 'c' in the draft (2 of 3 common ids differ)" in str(caught.value)


def test_a_draft_of_ones_own():
    class Echo:
        """Proposes the prompt's own continuation, as prompt lookup would."""

        name, prefill_seconds, compile_seconds = "echo", 0.0, 0.0

        def open(self, request):
            return EchoSession()

    class EchoSession:
        def __init__(self):
            self.seen: list[int] = []

        def accept(self, tokens):
            self.seen += tokens

        def propose(self, policy, limits):
            from treespec_compiler.speculation.proposal import Proposal

            proposal = Proposal.root(self.seen[-1], proposer="echo")
            truth = greedy(TARGET, PROMPT, 60)[len(self.seen) :]
            for depth, token in enumerate(truth[: min(limits.depth, 2)]):
                proposal.tokens.append(token)
                proposal.parents.append(depth)
                proposal.depths.append(depth + 1)
                proposal.ranks.append(0)
            return proposal

        def close(self):
            pass

    for draft in (Echo(), [Echo(), ModelDraft(partial(0.5))]):
        out = treespec.generate(target(), PROMPT, draft=draft, max_new_tokens=31)
        assert out.sequences.tolist() == [greedy(TARGET, PROMPT, 31)]
        assert out.stats.tokens_per_step >= 2.9


def test_generate_takes_what_stream_takes():
    one, other = inspect.signature(treespec.generate), inspect.signature(treespec.stream)
    assert one.parameters == other.parameters and "temperature" in one.parameters
    assert "GenerationOutput" in str(one.return_annotation)
    with pytest.raises(TypeError, match="temprature"):
        treespec.generate(target(), PROMPT, temprature=1.0)
