"""What a model's own `generation_config` asks for: it is honoured, or named in a warning, never passed over."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..logs import logger
from ..speculation.sampling.score_processors import ScoreProcessor
from ..speculation.sampling.settings import Sampling
from .settings import Call

log = logger(__name__)

# Fields that transformers makes processors of scores of, and the values that ask for nothing.
PROCESSED: dict[str, tuple[object, ...]] = {
    "sequence_bias": (),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "renormalize_logits": (False,),
}
# Fields that make it another kind of generation, or that a call says by itself.
ELSEWHERE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
    "stop_strings": (),
    "token_healing": (False,),
    "max_time": (),
}
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

_SAID: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def with_model_defaults(call: Call, device: torch.device) -> Sampling:
    """How the call samples, with what the model's configuration adds and the call says nothing about.

    The rest of that is named in a warning, once a model.
    """
    config = getattr(call.module, "generation_config", None)
    if call.module is None or config is None or not call.model_defaults:
        return call.sampling
    left = [*_set(config, ELSEWHERE), *_sampling_left(config, call)]
    penalty = getattr(config, "repetition_penalty", None)
    sampling = call.sampling
    if call.repetition_penalty is None and penalty is not None:
        sampling = replace(sampling, repetition_penalty=penalty)
    asked = [*_set(config, PROCESSED)]
    if asked:
        processors = _processors(call, device, sampling.repetition_penalty)
        if processors is None:
            left += asked
        else:  # the penalty is among them, in its place
            sampling = replace(sampling, repetition_penalty=1.0, processors=(*processors, *sampling.processors))
    if left:
        _say(call.module, left)
    return sampling


def _set(config: Any, fields: dict[str, tuple[object, ...]]) -> Iterator[str]:
    for name, off in fields.items():
        value = getattr(config, name, None)
        if value is not None and not any(value == nothing for nothing in off):
            yield f"{name}={value!r}"


def _sampling_left(config: Any, call: Call) -> Iterator[str]:
    """How the model would be sampled, where the call says nothing else."""
    if not getattr(config, "do_sample", None):
        return
    if call.sampling.greedy:
        yield "do_sample=True"
    for name in SAMPLED:
        value = getattr(config, name, None)
        if value is not None and getattr(call, name, None) in (None, 0.0):
            yield f"{name}={value!r}"


def _processors(call: Call, device: torch.device, repetition_penalty: float) -> Sequence[ScoreProcessor] | None:
    """What transformers makes of the configuration; None: the model is not one of its own."""
    module: Any = call.module
    if not hasattr(module, "_get_logits_processor") or not hasattr(module, "_prepare_special_tokens"):
        return None
    config = copy.deepcopy(module.generation_config)
    config.update(
        do_sample=False,
        num_beams=1,
        guidance_scale=None,
        watermarking_config=None,
        repetition_penalty=repetition_penalty,
        max_length=len(call.prompt) + call.max_new_tokens,
        eos_token_id=sorted(call.end_ids(module)[0]) or None,
    )
    module._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    ids = torch.tensor([call.prompt], device=device)
    made: Sequence[ScoreProcessor] = module._get_logits_processor(
        config, input_ids_seq_length=len(call.prompt), encoder_input_ids=ids, device=device
    )
    return made


def _say(module: nn.Module, left: Sequence[str]) -> None:
    said, text = _SAID.setdefault(module, set()), ", ".join(left)
    if text not in said:
        said.add(text)
        log.warning("not taken from the model's generation_config: %s; say it in the call, if it can be said", text)
