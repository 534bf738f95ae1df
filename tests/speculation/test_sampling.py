"""`Sampling` against transformers' own processors and warpers; child samplers; how values are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_compiler.errors import InvalidOption
from treespec_compiler.speculation.sampling.chance import SeededChance
from treespec_compiler.speculation.sampling.device_rows import DeviceProcessor
from treespec_compiler.speculation.sampling.samplers import SAMPLERS, ChildSampler, as_sampler
from treespec_compiler.speculation.sampling.settings import Processor, Sampling

SETTINGS = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-k of one": {"temperature": 0.8, "top_k": 1},
    "top-k beyond the vocabulary": {"temperature": 0.8, "top_k": 900},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "top-p of almost nothing": {"temperature": 1.0, "top_p": 1e-6},
    "min-p": {"temperature": 1.0, "min_p": 0.2},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.7},
    "encouraged repetition": {"temperature": 1.0, "repetition_penalty": 0.6},
    "bias": {"temperature": 1.0, "logit_bias": {2: 1.5, 7: -3.0, 0: -math.inf}},
    "all": {
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "logit_bias": {1: 2.0, 5: -1.0},
    },
}


def huggingface(sampling: Sampling, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """What `transformers` samples from after `ids`, by its own selection of processors and its own order."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(
        do_sample=not sampling.greedy,
        temperature=sampling.temperature or None,
        top_k=sampling.top_k or 0,
        top_p=sampling.top_p or 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        sequence_bias={(token,): float(bias) for token, bias in (sampling.logit_bias or {}).items()} or None,
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(logits), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=len(ids))
    return processors(torch.tensor([ids]), logits[None].double())[0].softmax(-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_is_the_one_of_transformers(name):
    sampling = Sampling(**SETTINGS[name])
    for seed in range(5):
        logits = 3 * torch.randn(20, generator=torch.Generator().manual_seed(seed))
        prompt, path = [3, 1, 4, 1, 5], [9, 2, 6]
        processor = Processor(sampling)
        processor.accept(prompt)
        row = processor.row(logits.numpy(), path)
        torch.testing.assert_close(
            torch.from_numpy(row), huggingface(sampling, logits, prompt + path), atol=1e-12, rtol=0
        )
        assert row.dtype == np.float64 and row.sum() == pytest.approx(1.0, abs=1e-14)


@given(
    st.lists(st.floats(-12, 12), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 4),
    st.one_of(st.none(), st.integers(1, 13)),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.one_of(st.none(), st.floats(0, 1)),
    st.floats(0.3, 3),
)
@settings(max_examples=60)
def test_any_setting_is_the_one_of_transformers(logits, temperature, top_k, top_p, min_p, penalty):
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, logit_bias={0: 0.5}
    )
    processor = Processor(sampling)
    processor.accept([1])
    row = processor.row(np.array(logits), [0])
    wanted = huggingface(sampling, torch.tensor(logits, dtype=torch.float64), [1, 0]).numpy()
    assert np.abs(row - wanted).max() < 1e-12


@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_top_p_of_many_tokens(spread):
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    row = Processor(sampling).row(logits.numpy(), ())
    np.testing.assert_allclose(row, huggingface(sampling, logits, [1]).numpy(), atol=1e-12, rtol=0)


def test_ties_at_the_last_of_the_top_k_stay_as_in_transformers():
    row = Processor(Sampling(temperature=1.0, top_k=2)).row(np.array([1.0, 2.0, 1.0, 0.0]), ())
    assert (row > 0).tolist() == [True, True, True, False]


def test_greedy_is_the_argmax_after_bias_and_penalty():
    logits = np.array([1.0, 3.0, 2.0])
    assert Processor(Sampling()).row(logits, ()).tolist() == [0.0, 1.0, 0.0]
    penalised = Processor(Sampling(repetition_penalty=2.0))
    penalised.accept([7, 1])  # 7 is beyond this row's ids
    assert penalised.row(logits, ()).tolist() == [0.0, 0.0, 1.0]
    assert penalised.row(logits, [2]).tolist() == [0.0, 1.0, 0.0]
    assert Processor(Sampling(logit_bias={0: 5.0, 9: 50.0})).row(logits, ()).tolist() == [1.0, 0.0, 0.0]
    assert Sampling().plain and Sampling(top_k=3, seed=4).plain and not Sampling(logit_bias={1: 1.0}).plain


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_unusable_rows_are_told_from_usable_ones(bad):
    processor = Processor(Sampling(temperature=0.7, top_p=0.9, top_k=2))
    assert processor.row(np.array(bad), ()) is None
    assert processor.row(np.array([-math.inf, 1.0]), ()).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"temperature": -0.1}, "option temperature: got -0.1, expected a finite number of 0 or more"),
        ({"temperature": math.nan}, "option temperature: got nan"),
        ({"temperature": math.inf}, "option temperature: got inf"),
        ({"temperature": "hot"}, "option temperature: got 'hot'"),
        ({"temperature": True}, "option temperature: got True"),
        ({"top_k": 0}, "option top_k: got 0, expected an integer of 1 or more, or None"),
        ({"top_k": 2.5}, "option top_k: got 2.5"),
        ({"top_p": 0.0}, "option top_p: got 0.0, expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, "option top_p: got 1.1"),
        ({"min_p": -0.2}, "option min_p: got -0.2, expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "option repetition_penalty: got 0, expected a finite number above 0"),
        ({"logit_bias": [1, 2]}, "option logit_bias: got [1, 2], expected a mapping from token id to number"),
        ({"logit_bias": {"a": 1.0}}, "option logit_bias: got 'a', expected token ids"),
        ({"logit_bias": {-1: 1.0}}, "option logit_bias: got -1, expected token ids"),
        ({"logit_bias": {1: math.inf}}, "option logit_bias: got inf, expected finite numbers, or -inf to ban a token"),
        ({"seed": -1}, "option seed: got -1, expected an integer of 0 or more"),
        ({"seed": 1.5}, "option seed: got 1.5"),
    ],
)
def test_bad_values(arguments, text):
    with pytest.raises(InvalidOption) as caught:
        Sampling(**arguments)
    assert text in str(caught.value)


def test_numpy_numbers_are_numbers():
    assert Sampling(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias={np.int64(1): np.float64(2)})


# --- child samplers


def test_top_k_takes_the_likeliest_that_are_possible():
    q = np.array([0.2, 0.0, 0.4, 0.2, 0.2])
    assert SAMPLERS["top-k"].draw(q, 3, SeededChance(0)) == [2, 0, 3]
    assert SAMPLERS["top-k"].draw(q, 9, SeededChance(0)) == [2, 0, 3, 4]


def test_samplers_draw_from_the_support_only():
    q, chance = np.array([0.0, 0.5, 0.0, 0.5]), SeededChance(3)
    for _ in range(50):
        assert set(SAMPLERS["iid"].draw(q, 4, chance)) <= {1, 3}
        assert sorted(SAMPLERS["without-replacement"].draw(q, 4, chance)) == [1, 3]
        assert len(SAMPLERS["without-replacement"].draw(q, 1, chance)) == 1


def test_gumbel_draws_survive_weights_of_any_size():
    q = np.array([1.0, 5e-324, 1e-300, 0.0])
    assert SAMPLERS["without-replacement"].draw(q, 3, SeededChance(0))[0] == 0


def test_samplers_by_name():
    assert all(isinstance(sampler, ChildSampler) for sampler in SAMPLERS.values())
    with pytest.raises(InvalidOption, match="expected one of 'top-k', 'iid', 'without-replacement', or a ChildSampler"):
        as_sampler("topk")


@pytest.mark.parametrize("temperature", [1e-199, 1e-300, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_the_smallest_temperatures_are_greedy(temperature, more):
    logits = np.array([[3.0, -900.0, 4.5, -np.inf], [-1.0, -2.0, -3.0, -4.0]], dtype=np.float32)
    sampling = Sampling(temperature=temperature, **more)
    found, usable = DeviceProcessor(sampling, torch.device("cpu")).rows(torch.from_numpy(logits))
    assert usable.all() and found.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    for row, want in zip(logits, found.tolist(), strict=True):
        assert Processor(sampling).row(row, ()).tolist() == want
