"""`model.generate(..., custom_generate=treespec.hf_generate)`: the loop of transformers' `generate`, by speculation.

transformers prepares everything as it does for its own loop and calls `hf_generate` in the loop's place, so what it
prepared decides: its processors of scores, its criteria of stopping, its configuration.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ContextOverflow, InvalidOption, InvalidPrompt, Unsupported
from ..logs import logger
from ..runtime.engine import Engine
from ..runtime.generate import Stream, stream
from .hf_rows import PaddedRow, RowCriteria, RowProcessor

log = logger(__name__)

# Other algorithms than sampling token by token, with the values that ask for nothing.
OTHER_ALGORITHMS: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
# Processors that are no function of a row's ids and scores (they run the model, or keep what they saw), and the
# settings that ask for them.
STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
}
# What transformers prepares for the model's own forward pass; the tree program needs none of it.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def hf_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    streamer: Any = None,
    assistant_model: Any = None,
    draft: Any = None,
    policy: Any = None,
    verifier: Any = None,
    sampler: Any = None,
    options: Any = None,
    on_unsupported: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What transformers' own loop returns for the same arguments: the same ids greedily, else the same distribution.

    `draft`, `policy`, `verifier`, `sampler`, `options` are those of `treespec.generate` and are given to
    `model.generate` as they are; without a `draft`, an `assistant_model` is one. All of `generation_config` is
    honoured, or refused by its name (`InvalidOption`): beams, contrastive search, guidance, attentions. Rows of a batch
    may be padded on the left. `on_unsupported="fallback"` leaves models that cannot be converted to its own loop.
    """
    config, dropped = generation_config, _dropped()
    streamer = dropped.get("streamer") if streamer is None else streamer
    assistant_model = dropped.get("assistant_model") if assistant_model is None else assistant_model
    _check(config, logits_processor, model_kwargs)
    rows = _rows(input_ids, model_kwargs)
    keep = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
    settings: dict[str, Any] = {"policy": policy, "verifier": verifier, "sampler": sampler, "options": options}
    settings["draft"] = _draft(draft, assistant_model, config)
    run = _Run(model, rows, config, logits_processor, stopping_criteria, input_ids.device, keep, settings)
    try:
        steps = run.steps()
    except Unsupported as refusal:
        if on_unsupported != "fallback":
            raise
        log.warning("transformers' own loop runs instead: %s", refusal)
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, config, streamer=streamer, **model_kwargs
        )
    for row, tokens in steps:
        if streamer is not None:
            for token in tokens:
                streamer.put(torch.tensor([token]))
        row.tokens += tokens
    if streamer is not None:
        streamer.end()
    return _result(rows, input_ids, config, keep)


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    assistant_model: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Any:
    """The folder form, `custom_generate="DIR"`: everything given to `model.generate`, as it was given."""
    config, strings = generation_config, kwargs.pop("stop_strings", None)
    if strings is None:
        strings = getattr(config if config is not None else model.generation_config, "stop_strings", None)
    if strings is not None:
        stopping_criteria = [*(stopping_criteria or ()), _stop_strings(strings, tokenizer)]
        kwargs["stop_strings"] = None
    kwargs = {name: value for name, value in kwargs.items() if value is not None or name == "stop_strings"}
    if stopping_criteria is not None:
        from transformers import StoppingCriteriaList

        kwargs["stopping_criteria"] = StoppingCriteriaList(stopping_criteria)
    loop = functools.partial(hf_generate, streamer=streamer, assistant_model=assistant_model)
    return model.generate(inputs, generation_config=config, streamer=streamer, custom_generate=loop, **kwargs)


def _stop_strings(strings: Any, tokenizer: Any) -> Any:
    from transformers import StopStringCriteria

    if tokenizer is None:
        expected = "a `tokenizer` beside them"
        raise InvalidOption(name="stop_strings", got=strings, expected=expected, fix="Pass tokenizer=... as well.")
    return StopStringCriteria(tokenizer, strings)


def _dropped() -> Mapping[str, Any]:
    """Arguments of `model.generate` that it keeps from callables: a streamer would wait for ever for its end."""
    frame = sys._getframe(2)
    code = frame.f_code
    if code.co_name != "generate" or not frame.f_globals.get("__name__", "").startswith("transformers."):
        return {}
    return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model")}


def _draft(draft: Any, assistant_model: Any, config: Any) -> Any:
    """What guesses: what was asked for here, or what transformers' own speculation was asked for."""
    if draft is not None or assistant_model is not None:
        return assistant_model if draft is None else draft
    layers = getattr(config, "assistant_early_exit", None)
    if layers is not None:
        return f"early-exit:{layers}"
    return "ngram" if getattr(config, "prompt_lookup_num_tokens", None) is not None else None


def _check(config: Any, processors: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse by name what cannot be kept."""
    for name, off in OTHER_ALGORITHMS.items():
        value = getattr(config, name, None)
        if value is not None and value not in off:
            raise InvalidOption(name=name, got=value, expected="greedy decoding or sampling, token by token")
    for one in processors or ():
        kind = type(one).__name__
        if kind in STATEFUL:
            expected = "processors that are functions of a row's ids and scores"
            raise InvalidOption(name=STATEFUL[kind], got=kind, expected=expected)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length():
        got = f"{cache.get_seq_length()} tokens in it"
        raise InvalidOption(name="past_key_values", got=got, expected="none: prompts are run by the tree program")
    for name, value in model_kwargs.items():
        if name not in PREPARED and value is not None:
            expected = "token ids and an attention mask alone"
            raise InvalidOption(name=name, got=type(value).__name__, expected=expected)


def _rows(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[PaddedRow]:
    """The rows without their padding, which must be on the left."""
    batch, length = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    if mask is not None and (mask.shape != input_ids.shape or not bool((mask[:, -1] != 0).all())):
        got = f"an attention_mask {list(mask.shape)} that ends in padding, for ids {list(input_ids.shape)}"
        raise InvalidPrompt(got=got, expected="padding on the left", fix="Set tokenizer.padding_side = 'left'.")
    positions = model_kwargs.get("position_ids")
    rows = []
    for index in range(batch):
        pad = 0 if mask is None else int((mask[index] == 0).sum())
        if mask is not None and bool((mask[index, pad:] == 0).any()):
            raise InvalidPrompt(got="an attention_mask with a gap", expected="padding on the left", fix="Take it out.")
        if positions is not None:
            own = positions[index if positions.shape[0] > 1 else 0, pad:]
            if own.tolist() != list(range(length - pad)):
                expected = "positions that count a row's tokens from 0"
                raise InvalidOption(name="position_ids", got=own.tolist(), expected=expected)
        rows.append(PaddedRow(index, batch, input_ids[index, :pad], input_ids[index, pad:].tolist()))
    return rows


class _Run:
    """Rows of a batch, decoded together."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[PaddedRow],
        config: Any,
        processors: Any,
        criteria: Any,
        device: torch.device,
        keep: bool,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.length = rows[0].padding.numel() + len(rows[0].prompt)
        self.new = max(1, config.max_length - self.length)
        processors = list(processors or ())
        native: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
        if config.do_sample and not keep:
            processors = _split(processors, native)
        self.native = native
        self.processors = {row.index: RowProcessor(row, _chain(processors), keep) for row in rows}
        self.processed = bool(processors) or keep
        self.criteria = {row.index: RowCriteria(row, criteria or _never, device, keep) for row in rows}
        ends = getattr(config, "_eos_token_tensor", None)
        self.ends = () if ends is None else ends.flatten().tolist()

    def steps(self) -> Iterator[tuple[PaddedRow, list[int]]]:
        """Begin all rows, which raises what cannot be; then steps of rows until all are at their end."""
        if len(self.rows) == 1:
            row = self.rows[0]
            return self._alone(row, stream(self.model, row.prompt, **self.settings, **self._request(row)))
        largest = max(len(row.prompt) for row in self.rows) + self.new
        room = sum(len(row.prompt) + min(self.new, 1024) for row in self.rows)
        engine = Engine(self.model, max_requests=len(self.rows), max_tokens=max(largest, room), **self.settings)
        return self._together(engine)

    def _request(self, row: PaddedRow) -> dict[str, Any]:
        return {
            **self.native,
            "max_new_tokens": self.new,
            "eos_token_id": self.ends,
            "logits_processor": self.processors[row.index] if self.processed else None,
            "model_defaults": False,
        }

    def _alone(self, row: PaddedRow, steps: Stream) -> Iterator[tuple[PaddedRow, list[int]]]:
        with steps:
            for step in steps:
                tokens = self._until(row, step.tokens)
                yield row, tokens
                if row.done:
                    return
        self._check_end(row, steps.stats.finish_reason)

    def _together(self, engine: Engine) -> Iterator[tuple[PaddedRow, list[int]]]:
        with engine:
            requests = [engine.add(row.prompt, **self._request(row)) for row in self.rows]
            row_of = {request.number: row for request, row in zip(requests, self.rows, strict=True)}
            while not all(request.done for request in requests):
                for request, step in engine.step():
                    row = row_of[request.number]
                    yield row, self._until(row, step.tokens)
                    if row.done:
                        request.cancel()
                    else:
                        self._check_end(row, request.stats.finish_reason)
                for request in requests:
                    if request.error is not None:
                        raise request.error

    def _until(self, row: PaddedRow, tokens: Sequence[int]) -> list[int]:
        self.processors[row.index].take(tokens)
        shown, row.done = self.criteria[row.index].until(tokens)
        del row.scores[len(row.tokens) + len(shown) :], row.logits[len(row.tokens) + len(shown) :]
        return shown

    def _check_end(self, row: PaddedRow, reason: str | None) -> None:
        if reason == "context":  # transformers would go on where the model was not proved to
            used = len(row.prompt) + len(row.tokens)
            raise ContextOverflow(position=used, max_context=used)


def _never(ids: Tensor, scores: object) -> bool:
    return False


def _chain(processors: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors:
            scores = processor(ids, scores)
        return scores

    return apply


# The last processors, where they are these and in this order, are settings that drafts draw by, too.
_NATIVE = (
    ("MinPLogitsWarper", "min_p", "min_p"),
    ("TopPLogitsWarper", "top_p", "top_p"),
    ("TopKLogitsWarper", "top_k", "top_k"),
    ("TemperatureLogitsWarper", "temperature", "temperature"),
)


def _split(processors: Sequence[Any], native: dict[str, Any]) -> list[Any]:
    """The processors without their end, as far as `native` can say that."""
    rest = list(processors)
    for kind, attribute, name in _NATIVE:
        last = rest[-1] if rest else None
        if type(last).__name__ != kind or not _is_default(last):
            continue
        native[name] = getattr(last, attribute)
        rest.pop()
    return rest


def _is_default(warper: Any) -> bool:
    """Whether one token may be all that is left, and the others are impossible."""
    keep = getattr(warper, "min_tokens_to_keep", 1)
    return keep == 1 and getattr(warper, "filter_value", -float("inf")) == -float("inf")


def _result(rows: Sequence[PaddedRow], input_ids: Tensor, config: Any, keep: bool) -> Any:
    longest = max(len(row.tokens) for row in rows)
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None and any(len(row.tokens) < longest for row in rows):
        raise InvalidOption(name="pad_token_id", got=None, expected="an id, since rows end at different places")
    fill = 0 if pad is None else int(pad)
    new = [row.tokens + [fill] * (longest - len(row.tokens)) for row in rows]
    sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    scores = _columns([row.scores for row in rows], longest) if keep and config.output_scores else None
    logits = _columns([row.logits for row in rows], longest) if keep and config.output_logits else None
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)


def _columns(rows: Sequence[Sequence[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """By place [B, V]; NaN after a row's end, where transformers has what the model says of padding."""
    nothing = torch.full_like(rows[0][0], float("nan"))
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(longest))
