"""`generate` with a temperature: its whole output, over several steps, has exactly the target's distribution.

The loop runs on stand-in programs, once for every outcome of its choices; a chi-square test does real ones.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from enumeration import completed, error, law, outcomes, target_law
from fake_program import FakeProgram, greedy, table_row
from torch import nn

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidLogits, InvalidOption, LossyPair, TreespecError
from treespec_compiler.runtime import decoding
from treespec_compiler.speculation.cost import acceptance
from treespec_compiler.speculation.sampling.settings import Processor, Sampling
from treespec_compiler.speculation.verifiers.greedy import GreedyVerifier

VOCAB = 3
PROMPT = [1, 2]
PAIRS = [
    ("naive", "top-k"),
    ("naive", "iid"),
    ("multi-step", "iid"),
    ("recursive", "without-replacement"),
    ("traversal", "iid"),
    ("traversal", "without-replacement"),
]
HOT = {"temperature": 0.8, "eos_token_id": ()}


@functools.cache
def rows(vocab: int, seed: int):
    return functools.cache(table_row(vocab, seed))


def program(seed: int, vocab: int = VOCAB, **kw) -> FakeProgram:
    return FakeProgram(rows(vocab, seed), vocab, **kw)


def target_model(sampling: Sampling, vocab: int = VOCAB, seed: int = 1):
    """The target's processed distribution after PROMPT and `path`: the truth."""

    def model(path):
        processor = Processor(sampling)
        processor.accept([*PROMPT, *path])
        return processor.row(rows(vocab, seed)((*PROMPT, *path)).numpy(), ())

    return functools.cache(model)


def generated_law(monkeypatch, tokens: int, make_draft, vocab: int = VOCAB, **arguments):
    """The exact law of the new tokens of `generate`."""

    def run(chance):
        monkeypatch.setattr(decoding, "SeededChance", lambda seed: chance)
        out = treespec.generate(
            program(1, vocab), PROMPT, draft=make_draft(), max_new_tokens=tokens, seed=0, **{**HOT, **arguments}
        )
        return tuple(out.sequences[0, len(PROMPT) :].tolist())

    return law(outcomes(run))


DRAFTS = {
    "a draft": lambda: program(2),
    "the target itself": lambda: program(1),
    "smaller vocabulary": lambda: program(3, vocab=2),
    "larger vocabulary": lambda: program(4, vocab=5),
    "no draft": lambda: None,
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_three_tokens_have_the_targets_distribution(monkeypatch, verifier, sampler, name):
    found = generated_law(monkeypatch, 3, DRAFTS[name], verifier=verifier, sampler=sampler, policy=(2,))
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 3)) < 1e-9


@pytest.mark.parametrize(("verifier", "sampler"), [*PAIRS[2:4], PAIRS[5], ("block", "iid")])
def test_chains_of_two_over_several_steps(monkeypatch, verifier, sampler):
    found = generated_law(monkeypatch, 4, lambda: program(2), verifier=verifier, sampler=sampler, policy=(1, 1))
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 4)) < 1e-9


@pytest.mark.parametrize(("verifier", "sampler"), [PAIRS[2], PAIRS[5]])
def test_trees_of_two_levels(monkeypatch, verifier, sampler):
    arguments = {"verifier": verifier, "sampler": sampler, "policy": (2, 1), "logit_bias": {2: -1.5}}
    found = generated_law(monkeypatch, 4, lambda: program(2), **arguments)
    assert error(found, target_law(target_model(Sampling(temperature=0.8, logit_bias={2: -1.5})), 4)) < 1e-9


PROCESSED = {
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.3},
    "repetition penalty": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": {0: 1.0, 2: -math.inf}},
    "all": {"top_k": 2, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "logit_bias": {1: -0.5}},
}


@pytest.mark.parametrize("name", PROCESSED)
@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_processed_by_each_nodes_own_path(monkeypatch, verifier, sampler, name):
    widths = (1, 1) if name == "repetition penalty" else (2,)
    arguments = {"verifier": verifier, "sampler": sampler, "policy": widths} | PROCESSED[name]
    tokens = 4 if name == "repetition penalty" else 3
    found = generated_law(monkeypatch, tokens, lambda: program(2), **arguments)
    assert error(found, target_law(target_model(Sampling(temperature=0.8, **PROCESSED[name])), tokens)) < 1e-9


@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_two_drafts(monkeypatch, verifier, sampler):
    drafts = lambda: [program(2), program(3, vocab=2)]  # noqa: E731
    found = generated_law(monkeypatch, 3, drafts, verifier=verifier, sampler=sampler, policy=(1,))
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 3)) < 1e-9


@pytest.mark.parametrize(("verifier", "sampler"), PAIRS[2:4])
@pytest.mark.parametrize("policy", ["best-first:4", "equal-growth:2,2", "chain:2"])
def test_trees_picked_by_a_policy(monkeypatch, verifier, sampler, policy):
    found = generated_law(monkeypatch, 4, lambda: program(2), verifier=verifier, sampler=sampler, policy=policy)
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 4)) < 1e-9


@pytest.mark.parametrize(("verifier", "sampler"), PAIRS)
def test_a_draft_and_n_grams(monkeypatch, verifier, sampler):
    from treespec_compiler.speculation.drafts.ngram import NGramDraft

    drafts = lambda: [program(2), NGramDraft(min_match=1)]  # noqa: E731
    found = generated_law(monkeypatch, 3, drafts, verifier=verifier, sampler=sampler, policy=(1,))
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 3)) < 1e-9


def broken(value: float, when) -> FakeProgram:
    """A program whose rows are `value` after some contexts."""
    good = rows(VOCAB, 2)
    return FakeProgram(lambda tokens: torch.full((VOCAB,), value) if when(tokens) else good(tokens), VOCAB)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("verifier", "sampler"), PAIRS[1:4])
def test_unusable_rows_of_the_draft_are_no_proposals(monkeypatch, verifier, sampler, value):
    draft = lambda: broken(value, lambda tokens: tokens[-1] == 0)  # noqa: E731
    found = generated_law(monkeypatch, 3, draft, verifier=verifier, sampler=sampler, policy=(2, 1))
    assert error(found, target_law(target_model(Sampling(temperature=0.8)), 3)) < 1e-9


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", [(2, 2), (1, 1, 1), "best-first:3", "equal-growth:2,2"])
def test_unusable_rows_of_the_draft_are_counted(temperature, policy):
    arguments = {"max_new_tokens": 40, "temperature": temperature, "policy": policy, "seed": 3}
    out = treespec.generate(program(1), PROMPT, draft=broken(math.nan, lambda t: t[-1] == 1), **arguments)
    assert out.stats.unusable_draft_rows > 0 and "NaN or infinite logits" in str(out.stats)
    if not temperature:
        assert out.sequences.tolist() == [greedy(rows(VOCAB, 1), PROMPT, 40)]
    always = treespec.generate(program(1), PROMPT, draft=broken(math.nan, lambda t: True), **arguments)
    assert always.stats.tokens == 40 and always.stats.accepted == 0
    assert always.stats.unusable_draft_rows == always.stats.steps - 1  # the last step wants no draft
    fine = treespec.generate(program(1), PROMPT, draft=program(2), **arguments)
    assert fine.stats.unusable_draft_rows == 0 and "NaN" not in str(fine.stats)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arguments", [{}, {"temperature": 0.8}, {"repetition_penalty": 1.2}])
def test_unusable_logits_of_the_target_end_the_request_and_no_other(arguments, value):
    good = rows(VOCAB, 1)

    def row(tokens):
        return torch.full((VOCAB,), value) if len(tokens) == 9 and tokens[0] == 2 else good(tokens)

    target = FakeProgram(row, VOCAB)
    other = treespec.stream(target, [1, 1], draft=program(2), max_new_tokens=30, **arguments)
    next(other)
    with pytest.raises(InvalidLogits, match="after the token at position 8") as caught:
        treespec.generate(target, [2, 1], draft=program(2), max_new_tokens=30, policy=(2, 1), **arguments)
    assert "others are untouched" in str(caught.value)
    assert sum(1 for _ in other) > 0 and other.stats.finish_reason == "length"
    assert all(cache.length() == 0 for cache in target.caches)
    with pytest.raises(InvalidLogits, match="position 0"):
        treespec.generate(FakeProgram(lambda t: torch.full((VOCAB,), value), VOCAB), [1], **arguments)


# --- seeds and arguments


def run(seed=None, **kw):
    arguments = {"temperature": 1.0, "policy": (2, 2), "max_new_tokens": 40, "draft": program(2), "seed": seed} | kw
    return treespec.generate(program(1), PROMPT, **arguments)


def test_seeds_reproduce_the_output():
    one, again, other = run(5), run(5), run(6)
    assert torch.equal(one.sequences, again.sequences) and one.stats.seed == 5
    assert not torch.equal(one.sequences, other.sequences)
    torch.manual_seed(1)
    unseeded, next_one = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run().sequences, unseeded.sequences)
    assert not torch.equal(unseeded.sequences, next_one.sequences)
    assert torch.equal(run(unseeded.stats.seed).sequences, unseeded.sequences)
    assert run(temperature=0.0).stats.seed is None


def test_automatic_trees_learn_from_earlier_calls_unless_a_seed_is_given():
    target, draft = program(1), program(2)

    def call(**kw):
        arguments = {"temperature": 1.0, "max_new_tokens": 40, "draft": draft} | kw
        return treespec.generate(target, PROMPT, **arguments)

    seeded = call(seed=7)
    torch.manual_seed(1)
    learning = call()
    assert learning.stats.seed is None and seeded.stats.seed == 7
    kinds = acceptance._MEMORY[target][draft]
    assert list(kinds) == ["default, default, 1"] and sum(kinds["default, default, 1"].tried) > 0
    again = call(seed=7)
    assert torch.equal(again.sequences, seeded.sequences)
    assert again.stats.nodes == seeded.stats.nodes
    call(temperature=0.5, verifier="multi-step", sampler="iid")
    assert list(kinds) == ["default, default, 1", "multi-step, iid, 0.5"]
    acceptance.forget(target)
    torch.manual_seed(1)
    assert torch.equal(call().sequences, learning.sequences)
    assert call(draft=None).stats.seed is not None


@pytest.mark.parametrize("verifier", ["greedy", "naive", "multi-step", "recursive", "traversal", "block", None])
def test_at_temperature_0_every_rule_is_greedy(verifier):
    out = run(temperature=0.0, verifier=verifier)
    assert out.sequences.tolist() == [greedy(rows(VOCAB, 1), PROMPT, 40)]


def test_greedy_with_a_penalty_takes_the_best_processed_token():
    sampling = Sampling(repetition_penalty=1.5, logit_bias={0: 0.3})
    tokens: list[int] = []
    for _ in range(12):
        tokens.append(int(target_model(sampling)(tuple(tokens)).argmax()))
    out = run(temperature=0.0, repetition_penalty=1.5, logit_bias={0: 0.3}, max_new_tokens=12)
    assert out.sequences[0, len(PROMPT) :].tolist() == tokens
    own = run(temperature=0.0, repetition_penalty=1.5, logit_bias={0: 0.3}, max_new_tokens=12, draft=program(1))
    assert own.sequences[0, len(PROMPT) :].tolist() == tokens and own.stats.tokens_per_step > 2.5


def test_a_perfect_draft_is_always_accepted():
    for verifier in ("multi-step", "recursive", "traversal", "block"):
        out = run(draft=program(1), verifier=verifier, policy=(1, 1, 1), max_new_tokens=41)
        assert out.stats.tokens_per_step == 4.0


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"verifier": "multi-step", "sampler": "top-k"}, LossyPair, "Use sampler='iid' with verifier='multi-step', or"),
        ({"verifier": "recursive", "sampler": "iid"}, LossyPair, "it may be the first one again"),
        ({"verifier": "multi-step", "sampler": "without-replacement"}, LossyPair, "never the first one again"),
        ({"verifier": "block", "sampler": "top-k", "policy": (1, 1)}, LossyPair, "not drawn at all"),
        ({"verifier": "greedy"}, LossyPair, "verifier='greedy' with a temperature above 0"),
        ({"verifier": GreedyVerifier()}, LossyPair, "not samples"),
        ({"verifier": "block", "policy": (1, 2)}, InvalidOption, "'block' with the policy <1,2>"),
        ({"verifier": "block", "policy": "auto"}, InvalidOption, "expected a chain: one draft and a policy such as"),
        ({"verifier": "block", "draft": [program(1), program(2)], "policy": (1,)}, InvalidOption, "with 2 drafts"),
        ({"sampler": "best"}, InvalidOption, "option sampler: got 'best', expected one of 'top-k', 'iid'"),
        ({"verifier": 3}, InvalidOption, "option verifier: got 3, expected one of 'greedy', 'naive'"),
        ({"top_p": 2}, InvalidOption, "option top_p: got 2"),
    ],
)
def test_what_is_refused_is_refused_before_anything_runs(arguments, kind, text):
    target = program(1)
    with pytest.raises(TreespecError) as caught:
        treespec.stream(target, PROMPT, **({"draft": program(2), "temperature": 1.0} | arguments))
    assert type(caught.value) is kind and text in str(caught.value)
    assert target.caches == []


def test_what_is_left_out_is_chosen_to_fit():
    for sampler in ("top-k", "iid", "without-replacement"):
        assert run(1, sampler=sampler).stats.tokens == 40
    for verifier in ("naive", "multi-step", "recursive", "traversal"):
        assert run(1, verifier=verifier).stats.tokens == 40


def test_the_plain_loop_samples_too(monkeypatch):
    from treespec_compiler.options import Options
    from treespec_compiler.runtime.generate import Stream
    from treespec_compiler.runtime.generation import Ending, Generation
    from treespec_compiler.runtime.plain import PlainProgram
    from treespec_compiler.runtime.stats import Stats

    class Model(nn.Module):
        def forward(self, ids):
            return torch.stack([rows(VOCAB, 1)(tuple(ids[0].tolist()))])[None]

    def plain(chance):
        monkeypatch.setattr(decoding, "SeededChance", lambda seed: chance)
        sampling = Sampling(temperature=0.8, repetition_penalty=1.4, seed=0)
        policy = treespec.StaticExpansion((1,))
        judge, drawing = decoding.appoint(sampling, None, None, policy, drafts=0)
        ending = Ending(2, frozenset(), frozenset())
        program = PlainProgram(Model(), Options())
        request = Generation(program, PROMPT, ending, [], policy, judge, Stats(), drawing)
        return tuple(token for step in Stream(request, torch.device("cpu")) for token in step.tokens)

    truth = target_law(target_model(Sampling(temperature=0.8, repetition_penalty=1.4)), 2)
    assert error(law(outcomes(plain)), truth) < 1e-9


# --- real programs


def chi_square(count: dict, truth: dict, total: int) -> tuple[float, int]:
    """The statistic and its degrees of freedom; cells that expect fewer than 5 are put together."""
    large = {path for path, x in truth.items() if total * x >= 5}
    cells = [(count.get(path, 0), total * truth[path]) for path in large]
    rest = 1.0 - sum(truth[path] for path in large)
    if total * rest >= 5:
        cells.append((total - sum(found for found, _ in cells), total * rest))
    return sum((found - wanted) ** 2 / wanted for found, wanted in cells), len(cells) - 1


def check_law(model, draft, ids, arguments, tokens: int, total: int) -> None:
    """Generate `total` times; the new tokens must look like samples from the eager model, at 1 in 30000."""
    options = {"lowering": "eager"}
    sampling = Sampling(**{name: value for name, value in arguments.items() if name not in ("verifier", "policy")})

    @functools.cache
    def truth(path):
        processor = Processor(sampling)
        processor.accept([*ids, *path])
        with torch.no_grad():
            return processor.row(model(torch.tensor([[*ids, *path]])).logits[0, -1].numpy(), ())

    target, small = (treespec.tree_program(m, options=options) for m in (model, draft))
    count: dict = {}
    for seed in range(total):
        out = treespec.generate(
            target, ids, draft=small, max_new_tokens=tokens, seed=seed, eos_token_id=(), **arguments
        )
        new = tuple(out.sequences[0, len(ids) :].tolist())
        count[new] = count.get(new, 0) + 1
    statistic, freedom = chi_square(count, target_law(truth, tokens), total)
    assert freedom > 3
    # Wilson-Hilferty: the cube root of chi-square / freedom is nearly normal
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert z < 4, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("verifier", ["naive", "multi-step", "recursive", "traversal", "block"])
def test_chi_square_with_tiny_models(verifier):
    pytest.importorskip("transformers")
    from llamas import llama

    target, draft = (llama(seed, vocab=8, hidden=32, layers=1) for seed in (0, 1))
    arguments = {"temperature": 1.5, "top_p": 0.97, "repetition_penalty": 1.2, "verifier": verifier}
    policy = (1, 1) if verifier == "block" else (2, 1)
    check_law(target, draft, [1, 2, 3], arguments | {"policy": policy}, tokens=4, total=400)


@pytest.mark.rare
@pytest.mark.slow
def test_chi_square_with_the_demo_pair():
    demo = pytest.importorskip("treespec_compiler.demo")
    if not (demo.paths.target / "model.safetensors").is_file():
        pytest.skip("the demo pair is not in this checkout")
    ids = demo.load_tokenizer()(demo.heldout_prompts()[0].text)["input_ids"][:24]
    arguments = {"temperature": 1.0, "top_k": 4, "policy": (2, 2)}
    check_law(demo.load_target(), demo.load_draft(), ids, arguments, tokens=3, total=300)


def test_completed_is_what_decoding_on_gives():
    uniform = lambda path: np.array([0.5, 0.5])  # noqa: E731
    assert completed({(0,): 0.25, (1, 1): 0.75}, uniform, 2) == {(0, 0): 0.125, (0, 1): 0.125, (1, 1): 0.75}
