"""How a model is called: with which arguments, which of them carry tokens and positions, and where its logits are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refusal, TreespecError, Unsupported
from .broken_graphs import LOGITS

# Length of the example prompt. Any length above 1 does: the dimension is dynamic and every guard on it is examined.
EXAMPLE_TOKENS = 11

ROLES = ("tokens", "positions", "constant")


def original_module(model: nn.Module) -> nn.Module:
    """The user's module: unwraps `torch.compile(model)`; a module compiled in place is its own original."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def call_module(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module with its hooks, but never by code that `model.compile()` made."""
    return model._call_impl(*args, **kwargs)


def logits_of(output: Any) -> Any:
    """The logits in a model's output: `.logits`, `[0]`, or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is not None:
        return logits
    if isinstance(output, Mapping):
        if "logits" not in output:
            raise Unsupported(
                Refusal.CALL,
                f"the model returns a mapping without logits: {', '.join(map(str, output))}",
                way_out="return the logits under the name 'logits', or the tensor alone",
            )
        return output["logits"]
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        where = f"a {type(output).__name__} that starts with " if first is not output else ""
        raise Unsupported(
            Refusal.CALL,
            f"the model returns {where}{'None' if first is None else f'a {type(first).__name__}'}, not logits",
            way_out=LOGITS,
        )
    return first


@dataclass(frozen=True)
class CallSpec:
    """How a model is called: positional and keyword arguments, and which of them carry tokens and positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: dict[str, str]  # "0", "1", ... for positional arguments, names for keywords

    def with_tokens(self, tokens: Tensor) -> CallSpec:
        """The same call with other token ids [1, T]; positions become 0..T-1."""

        def fill(key: str, value: Any) -> Any:
            role = self.roles.get(key)
            if role == "tokens":
                return tokens
            if role == "positions":
                steps = torch.arange(tokens.shape[-1], dtype=value.dtype, device=tokens.device)
                return steps.expand(value.shape[:-1] + steps.shape)
            return value

        args = tuple(fill(str(i), a) for i, a in enumerate(self.args))
        return CallSpec(args, {k: fill(k, v) for k, v in self.kwargs.items()}, self.roles)

    def with_length(self, length: int) -> CallSpec:
        """The same call with `length` example tokens."""
        tokens = tokens_of(self)
        ids = torch.arange(length, device=tokens.device, dtype=tokens.dtype).remainder(2).unsqueeze(0)
        return self.with_tokens(ids)


def call_spec(model: nn.Module, example: Any = None, roles: Mapping[str, str] | None = None) -> CallSpec:
    """Work out how to call `model` with token ids only.

    `example`: a tensor of ids [1, T], a tuple of positional arguments, or a mapping of keyword arguments.
    `roles`: argument name (or position, as a string) -> "tokens" | "positions" | "constant".
    `use_cache=False` is passed where the signature has it (or takes anything, and the configuration has it): with a
    cache a window shorter than the model's can vanish from the trace.
    """
    signature = inspect.signature(model.forward)
    names = list(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example is None:
        example = torch.arange(EXAMPLE_TOKENS, device=device).remainder(2).unsqueeze(0)
    if isinstance(example, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = dict(example)
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cached = "use_cache" in names or (takes_any and hasattr(config, "use_cache"))
    if cached and "use_cache" not in kwargs:
        kwargs["use_cache"] = False
    if "return_dict" in names and "return_dict" not in kwargs and not takes_any:
        kwargs["return_dict"] = True
    found = _roles(args, kwargs, names, dict(roles or {}))
    return CallSpec(args, kwargs, found)


def _roles(args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], given: dict[str, str]) -> dict[str, str]:
    for key, role in given.items():
        if role not in ROLES:
            raise TreespecError(f"Role of argument {key!r}: got {role!r}, expected one of {', '.join(ROLES)}.")
    tensors = {str(i): a for i, a in enumerate(args) if isinstance(a, Tensor)}
    tensors |= {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    roles: dict[str, str] = {}
    for key in tensors:
        name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
        found: str | None = given.get(key, given.get(name))
        if found is None and name == "position_ids":
            found = "positions"
        if found is None and "tokens" not in roles.values() and "tokens" not in given.values():
            found = "tokens"
        roles[key] = found or "constant"
    if list(roles.values()).count("tokens") != 1:
        raise TreespecError(
            f"The example call has {list(roles.values()).count('tokens')} token arguments, expected exactly one. "
            "Say which argument holds the token ids: roles={'input_ids': 'tokens'}."
        )
    return roles


def tokens_of(call: CallSpec) -> Tensor:
    """The example token ids [1, T] of a call."""
    key = next(k for k, role in call.roles.items() if role == "tokens")
    return call.args[int(key)] if key.isdigit() else call.kwargs[key]
