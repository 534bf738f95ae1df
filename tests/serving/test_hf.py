"""transformers' `generate` with our loop gives what it gives with its own."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_settings import CASES, DRAFTS, GREEDY, SAMPLED
from llamas import EAGER, PROMPT, llama, transformers

import treespec_compiler as treespec
from treespec_compiler.cli.main import main
from treespec_compiler.errors import ContextOverflow, InvalidOption, InvalidPrompt, Refusal, Unsupported

COUNT = 16


@pytest.fixture(scope="module")
def model():
    return llama(0)


@pytest.fixture(scope="module")
def small():
    return llama(1)


IDS = torch.tensor([PROMPT])


def run(model, ids=IDS, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": COUNT, "do_sample": False, **settings})


def ours(model, ids=IDS, mask=None, **settings):
    return run(
        model, ids, mask, custom_generate=treespec.hf_generate, **{"options": EAGER, "policy": "2,1", **settings}
    )


@pytest.mark.parametrize(("name", "draft"), CASES)
def test_greedy_ids_are_the_same(model, small, name, draft):
    settings = GREEDY[name]
    if "watermarking_config" in settings:
        settings = {"watermarking_config": transformers.WatermarkingConfig(**settings["watermarking_config"])}
    wanted = run(model, **settings)
    assert torch.equal(ours(model, draft=DRAFTS.get(draft, small), **settings), wanted)


def test_an_assistant_model_is_a_draft(model, small):
    wanted = run(model)
    assert torch.equal(ours(model, assistant_model=small), wanted)
    assert torch.equal(ours(model, prompt_lookup_num_tokens=3), wanted)


def test_a_batch_with_padding(model, small):
    ids = torch.tensor([[0, 0, 0, 5, 17, 3], [9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    for settings in (
        {},
        {"eos_token_id": [39, 78, 20, 30, 40, 50, 60], "pad_token_id": 0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "eos_token_id": 39, "pad_token_id": 0},
        {"encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 2},
    ):
        wanted = run(model, ids, mask, **settings)
        for draft in (None, "ngram", small):
            assert torch.equal(ours(model, ids, mask, draft=draft, **settings), wanted)
    wanted = run(model, ids[:1], mask[:1], num_return_sequences=1)
    assert torch.equal(ours(model, ids[:1], mask[:1], draft="ngram"), wanted)


def test_scores_and_logits(model, small):
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings |= {"repetition_penalty": 1.3, "eos_token_id": 39}
    wanted, found = run(model, **settings), ours(model, draft=small, **settings)
    assert type(found) is type(wanted) and torch.equal(found.sequences, wanted.sequences)
    assert len(found.scores) == len(wanted.scores) == len(found.logits)
    for mine, its in ((found.scores, wanted.scores), (found.logits, wanted.logits)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(its), atol=1e-4, rtol=1e-4)
    plain = ours(model, draft=small, return_dict_in_generate=True, output_logits=True)
    assert plain.scores is None and len(plain.logits) == COUNT


def test_scores_of_a_batch_end_with_its_rows(model):
    ids = torch.tensor([[5, 17, 3], [9, 8, 7]])
    settings = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0, "eos_token_id": [39, 78]}
    wanted, found = run(model, ids, **settings), ours(model, ids, draft="ngram", **settings)
    assert torch.equal(found.sequences, wanted.sequences) and len(found.scores) == len(wanted.scores)
    for mine, its in zip(found.scores, wanted.scores, strict=True):
        known = ~mine.isnan()
        torch.testing.assert_close(mine[known], its[known], atol=1e-4, rtol=1e-4)


def test_processors_and_criteria_of_ones_own(model, small):
    class Even(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == ids.shape[1] % 2, -torch.inf)

    class Sum(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return ids[:, len(PROMPT) :].sum(1) > 300

    settings = {
        "logits_processor": transformers.LogitsProcessorList([Even()]),
        "stopping_criteria": transformers.StoppingCriteriaList([Sum()]),
    }
    wanted = run(model, **settings)
    assert wanted.shape[1] < len(PROMPT) + COUNT
    assert torch.equal(ours(model, draft=small, **settings), wanted)
    allowed = functools.partial(lambda row, ids: [3, 4, int(ids[-1])])
    wanted = run(model, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(ours(model, draft=small, prefix_allowed_tokens_fn=allowed), wanted)


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.found: list[int | None] = []

    def put(self, value) -> None:
        self.found += value.flatten().tolist()

    def end(self) -> None:
        self.found.append(None)


def test_a_streamer_is_given_tokens_and_its_end(model, small):
    its, mine = Kept(), Kept()
    run(model, streamer=its)
    ours(model, draft=small, streamer=mine)
    assert mine.found == its.found and mine.found[-1] is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])}, "position_ids"),
        ({"draft": "no such"}, "draft"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(model, settings, name):
    with pytest.raises(InvalidOption, match=f"Invalid option {name}"):
        ours(model, **settings)


def test_padding_on_the_right_is_refused(model):
    with pytest.raises(InvalidPrompt, match="ends in padding"):
        ours(model, torch.tensor([[1, 2, 0], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    with pytest.raises(InvalidPrompt, match="a gap"):
        ours(model, torch.tensor([[1, 2, 3]]), torch.tensor([[1, 0, 1]]))


@pytest.mark.rare
def test_a_full_context_is_an_error(model):
    for ids in (IDS, IDS.expand(2, -1)):
        with pytest.raises(ContextOverflow, match="below 16"):
            ours(model, ids, draft="ngram", options={**EAGER, "max_context": 16})


def test_a_model_that_cannot_be_converted(model, monkeypatch):
    from treespec_compiler.serving import hf

    def refuse(*_, **__):
        raise Unsupported(Refusal.NO_ATTENTION, "no attention at all")

    monkeypatch.setattr(hf, "stream", refuse)
    with pytest.raises(Unsupported):
        ours(model)
    assert torch.equal(ours(model, on_unsupported="fallback"), run(model))


# --- sampled: by distribution


def law(model, settings) -> torch.Tensor:
    """The distribution of the first two new tokens that transformers samples from [V, V]."""
    settings = settings | {"do_sample": True, "return_dict_in_generate": True, "output_scores": True}
    settings |= {"max_new_tokens": 1}
    first = run(model, **settings).scores[0][0].softmax(0).double()
    joint = torch.zeros(len(first), len(first), dtype=torch.float64)
    for token in first.nonzero()[:, 0].tolist():
        ids = torch.cat([IDS, torch.tensor([[token]])], 1)
        joint[token] = first[token] * run(model, ids, **settings).scores[0][0].softmax(0).double()
    return joint


@pytest.mark.family
@pytest.mark.parametrize("settings", [{"top_k": 3, "temperature": 1.3}, {"top_k": 4, "no_repeat_ngram_size": 1}])
def test_samples_have_the_law_of_transformers(model, small, settings):
    wanted, total = law(model, settings), 400
    found = torch.zeros_like(wanted)
    torch.manual_seed(0)
    for _ in range(total):
        ids = ours(model, draft=small, do_sample=True, max_new_tokens=2, policy="2", **settings)
        found[ids[0, -2], ids[0, -1]] += 1
    assert not found[wanted == 0].any()
    cells = wanted > 0
    statistic = ((found - total * wanted)[cells] ** 2 / (total * wanted[cells])).sum().item()
    freedom = int(cells.sum()) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5  # some four deviations above its mean


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_rows_are_transformers_own(model, small, name):
    """The distributions our loop samples from are those of transformers on the same path, whatever the tree was."""
    settings = SAMPLED[name] | {"do_sample": True, "return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    found = ours(model, draft=small, **settings)
    for place, mine in enumerate(found.scores):
        ids = found.sequences[:, : len(PROMPT) + place]
        its = run(model, ids, **settings | {"max_new_tokens": 1}).scores[0]
        torch.testing.assert_close(mine.softmax(1), its.softmax(1), atol=1e-5, rtol=1e-4)


def test_the_folder_form(model, small, tmp_path, capsys):
    assert main(["export-custom-generate", str(tmp_path / "mine")]) == 0
    assert "generate.py" in capsys.readouterr().out
    folder = {"custom_generate": str(tmp_path / "mine"), "trust_remote_code": True, "options": EAGER}
    its, mine = Kept(), Kept()
    wanted = run(model, streamer=its, repetition_penalty=1.3)
    assert torch.equal(run(model, streamer=mine, draft=small, repetition_penalty=1.3, **folder), wanted)
    assert mine.found == its.found
    with pytest.raises(InvalidOption, match="stop_strings"):
        run(model, stop_strings=["x"], **folder)
