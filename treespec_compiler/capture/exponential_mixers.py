"""Known recurrences whose weights are exponentials, as `mixer_code` has the others: RWKV's time mixing, xLSTM's mLSTM.

Both keep a running maximum of exponents. RWKV's is there for the numbers' sake; mLSTM's divisor reads it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .source_hash import source_hash


def rwkv_linear_attention(time_decay, time_first, key, value, state=None, return_state=False):
    """RWKV-4 (arXiv 2305.13048): every channel is a head, whose token counts by exp(key), and at first by more."""
    import torch

    if state is not None or return_state:
        raise NotImplementedError("time mixing with a state of the model's own")
    gate = key.float()
    decay = torch.zeros_like(gate) - torch.exp(time_decay)
    ones = torch.ones_like(gate[:, :, :1, None])
    bonus = gate + time_first
    out = torch.ops.treespec.exponential_recurrence(ones, ones, value.float()[..., None], decay, gate, bonus, False)
    return (out[..., 0] / out[..., 1]).to(key.dtype), None


def rwkv_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: decays near 0 and 1, keys whose exponentials no float32 holds."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for shift, spread in ((-7.0, 0.5), (0.0, 5.0), (2.0, 200.0), (-3.0, 1.0)):
        decay, first = (torch.randn(6, generator=generator) for _ in range(2))
        key, value = (torch.randn(1, tokens, 6, generator=generator) for _ in range(2))
        found.append(((shift + decay, first, spread * key - spread, value), {}))
    return found


def mlstm_backend(
    self,
    query,
    key,
    value,
    igate,
    fgate,
    c_initial=None,
    n_initial=None,
    m_initial=None,
    return_last_states=None,
    mode=None,
):
    """The mLSTM of xLSTM (arXiv 2405.04517): an exponential gate and a forgetting one a head, over what the weights and
    their largest exponent make of a divisor."""
    import torch

    if c_initial is not None or n_initial is not None or m_initial is not None:
        raise NotImplementedError("the mLSTM with a state of the model's own")
    if "inference" not in (self.config.mode if mode is None else mode):
        raise NotImplementedError("the mLSTM in training")
    q, k, v, gate, forget = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
    decay = torch.nn.functional.logsigmoid(forget).float()
    q = q.float() * query.shape[-1] ** -0.5
    out = torch.ops.treespec.exponential_recurrence(q, k.float(), v.float(), decay, gate.float(), None, True)
    sums, weights, largest = out[..., :-2], out[..., -2:-1], out[..., -1:]
    read = sums / (torch.maximum(weights.abs(), torch.exp(-largest)) + self.config.eps)
    return read.transpose(1, 2).to(query.dtype), None


# Of the functions that a backend calls by the names of attributes, and of which its own source says nothing.
MLSTM_KERNELS = {
    "mlstm_chunkwise_native_autograd": "47ba4061b80cd403",
    "mlstm_recurrent_sequence_native": "79cff06915c8da0f",
    "mlstm_recurrent_step_native": "8d65f71172c55523",
    "wrap_chunkwise_arbitrary_sequence_length": "e4eb951c47b07b28",
}


def mlstm_is_known(backend: nn.Module) -> bool:
    """Whether what the backend calls are the functions that the test speaks for."""
    wrapper: Any = backend._inference_fn
    given = dict(wrapper.keywords)
    inner = [given.pop(f"mlstm_{name}_kernel", None) for name in ("chunkwise", "sequence", "step")]
    functions = [wrapper.func, *(each.func if isinstance(each, functools.partial) else each for each in inner)]
    if not all(isinstance(each, types.FunctionType) for each in functions):
        return False
    config: Any = backend.config
    states = [each.keywords for each in inner if isinstance(each, functools.partial)]
    wide = all(kept == {"dtype_state": torch.float32} for kept in states)
    known = {each.__name__: source_hash(each) for each in functions} == MLSTM_KERNELS
    return known and wide and given["eps"] == config.eps and given["chunk_size"] == config.chunk_size


def mlstm_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A backend of transformers' own and arguments for so many tokens: chunks of two sizes, gates near 0 and 1."""
    own = importlib.import_module("transformers.models.xlstm.modeling_xlstm")
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for chunk, fade, spread in ((16, -8.0, 1.0), (64, 2.0, 3.0), (64, 12.0, 3.0)):
        config = own.xLSTMConfig(hidden_size=24, num_heads=3, chunk_size=chunk, mode="inference")
        query, key = (torch.randn(1, 3, tokens, 4, generator=generator) for _ in range(2))
        gates = (spread * torch.randn(1, 3, tokens, generator=generator) for _ in range(2))
        igate, fgate = gates
        value: Tensor = torch.randn(1, 3, tokens, 5, generator=generator)
        found.append(((own.xLSTMBackend(config), query, key, value, igate, fgate + fade), {}))
    return found
