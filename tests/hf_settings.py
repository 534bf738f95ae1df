"""Fifty configurations of transformers' `generate`, for a tiny model of 128 ids."""

from __future__ import annotations

from itertools import product
from typing import Any

EOS = 39
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "end": {"eos_token_id": EOS},
    "ends": {"eos_token_id": [EOS, 78]},
    "max length": {"max_new_tokens": None, "max_length": 15},
    "one token": {"max_new_tokens": 1},
    "shortest new": {"eos_token_id": EOS, "min_new_tokens": 12},
    "shortest": {"eos_token_id": EOS, "min_length": 14},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.7},
    "n-grams of 1": {"no_repeat_ngram_size": 1},
    "n-grams of 2": {"no_repeat_ngram_size": 2},
    "n-grams of 3": {"no_repeat_ngram_size": 3},
    "prompt's penalty": {"encoder_repetition_penalty": 4.0},
    "prompt's n-grams": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[5], 30.0], [[9], 20.0]]},
    "bad word": {"bad_words_ids": [[78]]},
    "bad words": {"bad_words_ids": [[78, 78], [43]], "eos_token_id": EOS},
    "bias": {"sequence_bias": [[[78], -9.0], [[39, 7], 4.0]]},
    "suppressed": {"suppress_tokens": [43, 78]},
    "suppressed first": {"begin_suppress_tokens": [43]},
    "forced first": {"forced_bos_token_id": 3},
    "forced end": {"forced_eos_token_id": 3, "eos_token_id": 3},
    "decay": {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": 9},
    "invalid values": {"remove_invalid_values": True},
    "normalised": {"renormalize_logits": True},
    "watermark": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash"}},
    "penalty and n-grams": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": EOS},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[78]],
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [43],
        "eos_token_id": EOS,
        "min_new_tokens": 5,
        "renormalize_logits": True,
    },
}
# Of the greedy ones, those that are run with every draft, too.
WITH_DRAFTS = ("plain", "ends", "penalty", "n-grams of 2", "bad words", "all")
DRAFTS: dict[str, Any] = {"prompt lookup": "ngram", "early exit": "early-exit:1", "two": ["ngram", "early-exit:1"]}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top k": {"top_k": 3},
    "top p": {"top_p": 0.8, "top_k": 0},
    "min p": {"min_p": 0.1, "top_k": 0},
    "typical p": {"typical_p": 0.6, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.05, "top_k": 0},
    "eta": {"eta_cutoff": 0.05, "top_k": 0},
    "top h": {"top_h": 0.6, "top_k": 0},
    "all": {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}

CASES = [(name, "none") for name in GREEDY] + list(product(WITH_DRAFTS, DRAFTS))
