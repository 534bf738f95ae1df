"""Functions that are known to compute a recurrence: what they compute is traced as the op that it is.

Blocks, cumulative sums and loops are not read back op by op. A function is known by its name and the hash of its
source, helpers of its file included, and is believed only after a test: before the trace its own code is run on random
arguments of lengths around the borders of blocks, and gives what the recurrence gives token by token. Another source,
or another value, is a refusal.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..errors import InvalidMixer, Refusal, Unsupported
from ..ir import ops  # noqa: F401  (defines the ops that `mixer_code` calls)
from . import exponential_mixers, mixer_code
from .rewriting import Rewritten
from .source_hash import source_hash, syntax_of

Samples = Callable[[int, Generator], Sequence[tuple[tuple[Any, ...], dict[str, Any]]]]
"""Arguments (positional, named) for so many tokens, several sets of them."""

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 129)
"""Of tests: around borders of blocks of 16 and of 64."""

TOLERANCE = 2e-4
"""Of the largest value, for functions that compute in float32; 1e-9 for those that keep float64."""


@dataclass(frozen=True)
class Mixer:
    """A function of this `name` (a method: `Class.name`) with one of these sources, what it is as an op, and arguments
    to test it with."""

    name: str
    hashes: frozenset[str]
    spelled: Callable[..., Any]
    samples: Samples
    holds: Callable[[Any], bool] | None = None
    """Of a method: whether a module is one that the test speaks for."""
    otherwise: str = ""
    """What is to be said of a module that is not."""


_MIXERS: dict[str, list[Mixer]] = {}


def _enter(mixer: Mixer) -> None:
    _MIXERS.setdefault(mixer.name, []).append(mixer)


for _spelled, _samples, _hashes in (
    (mixer_code.torch_chunk_gated_delta_rule, mixer_code.delta_samples, {"3ed694e3bf52317e"}),
    (mixer_code.chunk_kimi_delta_attention, mixer_code.kimi_samples, {"c9aeba3911244dd1"}),
    (mixer_code.mamba2_chunk_scan, mixer_code.mamba2_samples, {"b2c0a466a354947a"}),
    (mixer_code.mamba_selective_scan, mixer_code.mamba_samples, {"7741d95862eac581"}),
    (exponential_mixers.rwkv_linear_attention, exponential_mixers.rwkv_samples, {"265020813d708d8f"}),
):
    _enter(Mixer(_spelled.__name__, frozenset(_hashes), _spelled, _samples))
_enter(
    Mixer(
        "RecurrentGemmaRglru._rnn_scan",
        frozenset({"d1d4609c8cbb6c1b"}),
        mixer_code.rglru_scan,
        mixer_code.rglru_samples,
    )
)


_enter(
    Mixer(
        "MiniMaxLightningAttention.forward",
        frozenset({"3e77f3c9395f492b"}),
        mixer_code.lightning_attention,
        mixer_code.lightning_samples,
        mixer_code.lightning_is_made,
        "has buffers that are not what a MiniMaxLightningAttention makes of its rates",
    )
)
_enter(
    Mixer(
        "xLSTMBackend.forward",
        frozenset({"8adb0c56b7692adc"}),
        exponential_mixers.mlstm_backend,
        exponential_mixers.mlstm_samples,
        exponential_mixers.mlstm_is_known,
        "calls kernels of the mLSTM that are not known, or with other numbers than its configuration's",
    )
)


def register_mixer(function: Callable[..., Any], spelled: Callable[..., Any], samples: Samples) -> None:
    """Say that `function` computes a recurrence, and how `treespec::recurrence` does.

    `function`: a module-level function that a model's forward calls by name, or a method of a module's class;
    decorators are looked through. `spelled`: one with the same parameters that calls
    `torch.ops.treespec.recurrence(q, k, v, decay, beta)` and acts on each token alone otherwise. Its code takes the
    place of the function's while a model is traced, with that one's globals: what it needs it imports itself.
    `samples(tokens, generator)` gives sets of arguments, (positional, named), with which the two are compared when a
    model that names the function is converted for the first time. The function is believed with its present source
    alone.
    Raises `InvalidMixer` where the two cannot change places.
    """
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType) or not isinstance(spelled, FunctionType):
        raise InvalidMixer(name=str(function), got="an object without code", expected="functions written in Python")
    _check_places(inner, spelled)
    _enter(Mixer(_name(inner), frozenset({source_hash(inner)}), spelled, samples))


def _name(function: FunctionType) -> str:
    """By which it is known: a method's has its class's in front."""
    is_method = "." in function.__qualname__ and "<locals>" not in function.__qualname__
    return function.__qualname__ if is_method else function.__name__


def _check_places(function: FunctionType, spelled: FunctionType) -> None:
    there, here = (list(inspect.signature(f).parameters.values()) for f in (function, spelled))
    if [(p.name, p.kind) for p in there] != [(p.name, p.kind) for p in here]:
        names = ", ".join(p.name for p in here)
        expected = f"those of the function: {', '.join(p.name for p in there)}"
        raise InvalidMixer(name=function.__name__, got=f"the parameters {names}", expected=expected)
    if function.__code__.co_freevars or spelled.__code__.co_freevars:
        got = "a function that reads variables of a function around it"
        raise InvalidMixer(name=function.__name__, got=got, expected="functions at the top of a module")


def mixers_of(model: nn.Module) -> list[Rewritten]:
    """The known functions that a model's modules name, with the code of the op that each is.

    Raises `Unsupported` for one whose source is another, or that gives other values.
    """
    return [_believed(function, model) for function in dict.fromkeys(_called(model))]


def _check_modules(function: FunctionType, mixer: Mixer, holds: Callable[[Any], bool], model: nn.Module) -> None:
    for name, module in model.named_modules():
        method = getattr(type(module), function.__name__, None)
        if callable(method) and inspect.unwrap(method) is function and not holds(module):
            raise _refused(function, f"{name} {mixer.otherwise}")


def _called(model: nn.Module) -> Iterator[FunctionType]:
    """Functions with a known name that methods of the model's modules name, and such methods themselves."""
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            for value in vars(base).values():
                method = inspect.unwrap(value) if callable(value) else None
                if isinstance(method, FunctionType):
                    if _name(method) in _MIXERS:
                        yield method
                    for name in _MIXERS.keys() & set(method.__code__.co_names):
                        found = method.__globals__.get(name)
                        inner = inspect.unwrap(found) if callable(found) else None
                        if isinstance(inner, FunctionType):
                            yield inner


def _believed(function: FunctionType, model: nn.Module) -> Rewritten:
    before, known = function.__code__, _MIXERS[_name(function)]
    digest = source_hash(function)
    mixer = next((each for each in reversed(known) if digest in each.hashes), None)
    if mixer is None:
        raise _refused(
            function,
            f"{function.__name__} is known as a recurrence, but not with this source (hash {digest}): it may compute "
            "something else",
        )
    if mixer.holds is not None:
        _check_modules(function, mixer, mixer.holds, model)
    if _TESTED.get(function) is not before:
        _test(function, mixer)
        _TESTED[function] = before
    spelled = mixer.spelled
    assert isinstance(spelled, FunctionType)
    return Rewritten(function, before, spelled.__code__, (), syntax_of(spelled))


_TESTED: weakref.WeakKeyDictionary[FunctionType, CodeType] = weakref.WeakKeyDictionary()


def _test(function: FunctionType, mixer: Mixer) -> None:
    """Its own values against the recurrence's."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tokens in LENGTHS:
            generator = Generator().manual_seed(tokens)
            for args, kwargs in mixer.samples(tokens, generator):
                got, wanted = (_first(each(*args, **kwargs)) for each in (function, mixer.spelled))
                error = _difference(got, wanted)
                if not error <= (1e-9 if got.dtype is torch.float64 else TOLERANCE):
                    raise _refused(
                        function,
                        f"{function.__name__} gives other values for {tokens} tokens than the recurrence that it is "
                        f"known as: they differ by {error:.1e} of the largest",
                    )


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or got.dtype is not wanted.dtype:
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _refused(function: FunctionType, reason: str) -> Unsupported:
    code = function.__code__
    return Unsupported(
        Refusal.MIXER,
        reason,
        node=function.__name__,
        source=f"{code.co_filename}:{code.co_firstlineno}, in {function.__name__}",
        way_out="say what it computes: treespec.register_mixer (docs/hybrids.md)",
    )
