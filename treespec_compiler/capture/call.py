"""How a model is called: with which arguments, which of them carry tokens and positions, and where its logits are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import Refusal, TreespecError, Unsupported
from .broken_graphs import LOGITS
from .supplied import ByFunction, SuppliedArguments, by_value

# Length of the example prompt. Any length above 1 does: the dimension is dynamic and every guard on it is examined.
EXAMPLE_TOKENS = 11

ROLES = ("tokens", "positions", "constant")


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def original_module(model: nn.Module) -> nn.Module:
    """The user's module: without `torch.compile`, and without what spreads training over devices.

    A module compiled in place is its own original; compiled twice, it is a function that leads to its `forward`.
    """
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif hasattr(model, "_torchdynamo_orig_callable") and not isinstance(model, nn.Module):
            owner = getattr(inspect.unwrap(model), "__self__", None)
            if not isinstance(owner, nn.Module):
                return model
            model = owner
        elif type(model) in _WRAPPERS and not (model._forward_hooks or model._forward_pre_hooks):
            model = cast(nn.Module, model.module)
        else:
            return model


def call_module(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module with its hooks, but never by code that `model.compile()` made."""
    return model._call_impl(*args, **kwargs)


def run_logits(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The logits of a call of the module with its hooks, as it returns them."""
    return logits_of(call_module(model, *args, **kwargs), vocabularies(model))


def vocabularies(model: nn.Module) -> frozenset[int]:
    """How many tokens there may be: rows of embeddings, and what the configuration says."""
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    named = getattr(getattr(model, "config", None), "vocab_size", None)
    return frozenset(rows | ({named} if isinstance(named, int) else set()))


def logits_of(output: Any, sizes: frozenset[int] = frozenset()) -> Any:
    """The logits in a model's output: the tensor itself, what is called `logits`, or the first tensor that can be.

    Nothing (None) and single numbers, such as a loss, are passed over. `sizes` are those a vocabulary may have: where
    the first tensor has none of them last, and exactly one other does, that one is meant.
    """
    if isinstance(output, Tensor):
        return output
    named = getattr(output, "logits", None)
    if named is None and isinstance(output, Mapping):
        named = output.get("logits")
    if named is not None:
        return named
    found = _tensors(output)
    if not found:
        raise Unsupported(
            Refusal.CALL,
            f"the model returns a {type(output).__name__} without logits{_contents(output)}",
            way_out=LOGITS,
        )
    if isinstance(output, Mapping) and len(found) > 1:
        raise Unsupported(
            Refusal.CALL,
            f"the model returns a mapping without logits: {', '.join(map(str, output))}",
            way_out="return the logits under the name 'logits', or the tensor alone",
        )
    if len(found) > 1 and found[0].shape[-1] not in sizes:
        fitting = [t for t in found if t.shape[-1] in sizes]
        return fitting[0] if len(fitting) == 1 else found[0]
    return found[0]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of one dimension or more in an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.dim() else []
    if isinstance(output, Mapping):
        parts: list[Any] = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    elif is_dataclass(output):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _contents(output: Any) -> str:
    if not isinstance(output, (tuple, list)):
        return ""
    return f" (of {', '.join(type(part).__name__ for part in output)})" if output else " (it is empty)"


@dataclass(frozen=True)
class CallSpec:
    """How a model is called: positional and keyword arguments, and which of them carry tokens and positions."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    roles: dict[str, str]  # "0", "1", ... for positional arguments, names for keywords
    ids: Tensor | None = None
    """What `given` makes the call of."""
    given: Callable[[Tensor], SuppliedArguments] | None = None
    """Makes the call of token ids of any length, while tracing too; None: the arguments are the call."""

    @property
    def traced(self) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, str]]:
        """(arguments, keywords, roles) of the function that is traced."""
        return (self.args, self.kwargs, self.roles) if self.ids is None else ((self.ids,), {}, {"0": "tokens"})

    def with_tokens(self, tokens: Tensor) -> CallSpec:
        """The same call with other token ids [1, T]; positions become 0..T-1."""
        if self.given is not None:
            assert self.ids is not None
            ids = tokens.reshape([-1 if i == token_dim(self.ids) else 1 for i in range(self.ids.dim())])
            args, kwargs = self.given(ids)
            return CallSpec(args, kwargs, self.roles, ids, self.given)

        def fill(key: str, value: Any) -> Any:
            role = self.roles.get(key)
            if role == "tokens":  # [1, T], [T, 1] or [T], as in the example
                return tokens.reshape([-1 if i == token_dim(value) else 1 for i in range(value.dim())])
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

    @property
    def length(self) -> int:
        """The number of example tokens."""
        tokens = tokens_of(self)
        return tokens.shape[token_dim(tokens)]


def token_dim(tokens: Tensor) -> int:
    """The dimension that counts the tokens of ids [1, T], [T, 1] or [T]."""
    return 0 if tokens.dim() == 2 and tokens.shape[1] == 1 and tokens.shape[0] > 1 else tokens.dim() - 1


def call_spec(model: nn.Module, example: Any = None, roles: Mapping[str, str] | None = None) -> CallSpec:
    """Work out how to call `model` with token ids only.

    `example`: a tensor of ids [1, T], [T, 1] or [T], a tuple of positional arguments, a mapping of keywords, or a
    function that makes one of these of ids [1, T]. Causal masks [.., T, T] and positions 0 .. T - 1 among the arguments
    are made for other numbers of tokens (`supplied`).
    `roles`: argument name (or position, as a string) -> "tokens" | "positions" | "constant".
    `use_cache=False` is passed where the signature has it (or takes anything, and the configuration has it): with a
    cache a window shorter than the model's can vanish from the trace.
    Raises `Unsupported` for a model that is TorchScript itself; its submodules may be.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported(
            Refusal.NO_GRAPH,
            "the model is TorchScript, which has no Python to trace and no signature",
            way_out="put it into a module of Python's whose forward calls it: self.inner = model; "
            "def forward(self, ids): return self.inner(ids)",
        )
    signature = inspect.signature(model.forward)
    names = list(signature.parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example is None:
        example = torch.arange(EXAMPLE_TOKENS, device=device).remainder(2).unsqueeze(0)
    function = example if callable(example) and not isinstance(example, (Tensor, Mapping)) else None
    if function is not None:
        ids = torch.arange(EXAMPLE_TOKENS, device=device).remainder(2).unsqueeze(0)
        example = function(ids)
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
    if function is not None:
        more = tuple(
            (key, value) for key, value in kwargs.items() if not isinstance(example, Mapping) or key not in example
        )
        return CallSpec(args, kwargs, {}, ids, ByFunction(function, more))
    found = _roles(args, kwargs, names, dict(roles or {}))
    call = CallSpec(args, kwargs, found)
    given = by_value(args, kwargs, {k: r for k, r in found.items() if not _told(k, names, roles)}, call.length)
    return call if given is None else CallSpec(args, kwargs, found, tokens_of(call), given)


def _told(key: str, names: list[str], roles: Mapping[str, str] | None) -> bool:
    """Whether the user says that an argument is a constant."""
    name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
    return bool(roles) and "constant" in (roles.get(key), roles.get(name))  # type: ignore[union-attr]


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
    """The example token ids of a call: [1, T], [T, 1] or [T]."""
    if call.ids is not None:
        return call.ids
    key = next(k for k, role in call.roles.items() if role == "tokens")
    return call.args[int(key)] if key.isdigit() else call.kwargs[key]
