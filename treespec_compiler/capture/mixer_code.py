"""Known recurrences, each as the op that it is: what the table of `mixers` puts in a function's place during a trace.

A function here has the parameters of the one it stands for, and its code runs with that one's globals: what it needs
besides torch it must import itself. Names of parameters are those of transformers 5.23.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor


def torch_chunk_gated_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **kwargs,
):
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464) of Qwen3-Next, Qwen3.5 and OLMo-hybrid."""
    import torch

    if initial_state is not None or output_final_state:
        raise NotImplementedError("the gated delta rule with a state of the model's own")
    q, k, v, rate, decay = (x.to(torch.float32) for x in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    out = torch.ops.treespec.recurrence(q * q.shape[-1] ** -0.5, k, v, decay, rate)
    return out.to(query.dtype), None


def delta_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: with and without shared key heads and norms, decays near 0 and 1."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator)

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for key_heads, norm, fade in ((2, True, 0.1), (4, False, 3.0), (1, True, 1e-4)):
        k = torch.nn.functional.normalize(draw(key_heads, 6), dim=-1)
        args = (draw(key_heads, 6), k if not norm else 3 * k, draw(4, 5))
        gates = {"g": -fade * draw(4).abs(), "beta": draw(4).sigmoid()}
        found.append((args, {**gates, "use_qk_l2norm_in_kernel": norm}))
    return found


def mamba2_chunk_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **kwargs,
):
    """Mamba-2 (arXiv 2405.21060): a decay for each head, keys B and queries C shared by groups of heads."""
    import torch

    if initial_states is not None or return_final_states:
        raise NotImplementedError("the scan with a state of the model's own")
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x = hidden_states.float()
    v = x * dt[..., None].float()
    out = torch.ops.treespec.recurrence(C.float(), B.float(), v, A.to(v.dtype) * dt.float(), None)
    return out if D is None else out + D[..., None] * x


def mamba2_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: with and without D, limits and softplus, decays near 0 and 1."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator)

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for groups, fade in ((1, 0.3), (2, 5.0), (4, 1e-3)):
        a = -fade * torch.rand(4, generator=generator)
        args = (draw(4, 5), draw(4), a, draw(groups, 3), draw(groups, 3), 16)
        more: dict[str, Any] = {"dt_softplus": True, "dt_bias": torch.randn(4, generator=generator)}
        if groups > 1:
            more |= {"D": torch.randn(4, generator=generator), "dt_limit": (0.01, 0.9)}
        found.append((args, more))
    return found


def mamba_selective_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    use_mambapy=False,
    use_associative_scan=False,
    **kwargs,
):
    """Mamba (arXiv 2312.00752): every channel is a head of its own, with a decay for each number of its state."""
    import torch

    if return_last_state:
        raise NotImplementedError("the scan with a state of the model's own")
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    step = dt.transpose(1, 2)[..., None]  # [1, T, channels, 1]
    v = step.float() * hidden_states.transpose(1, 2)[..., None].float()
    q, k = (x.transpose(1, 2)[:, :, None].float() for x in (C, B))
    out = torch.ops.treespec.recurrence(q, k, v, (A * step).float(), None)
    out = out.squeeze(3).transpose(1, 2).to(hidden_states.dtype)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    return out if z is None else out * torch.nn.functional.silu(z)


def mamba_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: with and without D, z and softplus, decays near 0 and 1."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for fade in (1e-3, 0.5, 8.0):
        a = -fade * torch.rand(4, 3, generator=generator)
        args = (draw(1, 4, tokens), draw(1, 4, tokens), a, draw(1, 3, tokens), draw(1, 3, tokens))
        more: dict[str, Any] = {"delta_softplus": True}
        if fade > 0.1:
            more |= {"D": draw(4), "z": draw(1, 4, tokens), "delta_bias": draw(4)}
        found.append((args, more))
    return found


def chunk_kimi_delta_attention(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **kwargs,
):
    """Kimi's delta attention (arXiv 2510.26692): the gated delta rule with a decay for each row of the state."""
    import torch

    if initial_state is not None or output_final_state:
        raise NotImplementedError("the delta rule with a state of the model's own")
    q, k, v, rate, decay = (x.to(torch.float32) for x in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        q = q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        k = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    out = torch.ops.treespec.recurrence(q * (1 / q.shape[-1] ** 0.5), k, v, decay, rate)
    return out.to(query.dtype), None


def kimi_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: with and without norms, decays near 0 and 1."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator)

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for norm, fade in ((True, 0.1), (False, 2.0), (True, 1e-4)):
        k = torch.nn.functional.normalize(draw(3, 6), dim=-1)
        args = (draw(3, 6), k if not norm else 3 * k, draw(3, 5), -fade * draw(3, 6).abs(), draw(3).sigmoid())
        found.append((args, {"use_qk_l2norm_in_kernel": norm}))
    return found


def rglru_scan(
    self,
    hidden_states,
    recurrent_gate,
    reset,
    recurrent_states,
    acc_dtype=torch.float32,
):
    """The RG-LRU of Griffin (arXiv 2402.19427), a method of RecurrentGemma's: every channel is a head with one number,
    which a document's first token resets."""
    import torch

    if recurrent_states is not None:
        raise NotImplementedError("the scan with a state of the model's own")
    v = hidden_states.to(acc_dtype)[..., None]
    ones = torch.ones_like(v)
    out = torch.ops.treespec.recurrence(ones, ones, v, (recurrent_gate * ~reset).to(acc_dtype).log(), None)
    return out.squeeze(3).to(hidden_states.dtype), None


def rglru_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for so many tokens: decays near 0 and 1, with and without documents that begin on the way."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for fade, often in ((1e-3, 0.0), (1.0, 0.2), (20.0, 0.0)):
        gate = torch.exp(-fade * torch.rand(1, tokens, 6, generator=generator))
        reset = torch.rand(1, tokens, 1, generator=generator) < often
        reset[:, 0] = True
        found.append(((None, torch.randn(1, tokens, 6, generator=generator), gate, reset, None), {}))
    return found


def lightning_attention(
    self,
    hidden_states,
    position_embeddings,
    attention_mask,
    past_key_values=None,
    **kwargs,
):
    """MiniMax-01's lightning attention (arXiv 2501.08313), a whole layer: sums that each head lets fade at a rate of
    its own, which is the same for all tokens. Its blocks' decays are buffers made of the rates (`lightning_is_made`).
    """
    import torch

    if past_key_values is not None:
        raise NotImplementedError("lightning attention with a state of the model's own")
    states = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = (states * attention_mask[:, :, None]).to(hidden_states.dtype)
    states = states.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
    q, k, v = torch.split(states, self.head_dim, dim=3)
    decay = torch.ones_like(v[..., 0]) * -self.slope_rate.reshape(-1)
    out = torch.ops.treespec.recurrence(q, k, v, decay, None).flatten(2)
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(out)), None


class _Lightning:
    """What the layer's forward reads of it, with random weights, in float64."""

    def __init__(self, fade: float, block: int, generator: Generator) -> None:
        self.num_attention_heads, self.head_dim, self.block_size, self.layer_idx = 3, 4, block, 0
        self.act_fn, self.norm = torch.nn.functional.silu, lambda x: x * 0.5
        weights = [torch.randn(n, m, generator=generator).double() for n, m in ((36, 5), (12, 5), (5, 12))]
        self.qkv_proj, self.output_gate, self.out_proj = (lambda x, w=w: x @ w.T for w in weights)
        self.slope_rate = fade * torch.rand(3, 1, 1, generator=generator).double()
        self.query_decay, self.key_decay, self.diagonal_decay = lightning_decays(self.slope_rate, block)


def lightning_decays(rate: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block's tokens since its begin [H, block, 1], to its end, and between two of them [1, H, block, block]."""
    place = torch.arange(block, device=rate.device) + 1
    apart = (place[:, None] - place)[None, None]
    between = torch.where(apart >= 0, -rate * apart, float("-inf"))
    return torch.exp(-rate * place[:, None]), torch.exp(-rate * (block - place[:, None])), torch.exp(between)


def lightning_is_made(layer: Any) -> bool:
    """Whether the layer's buffers are what its rates make of them, so that nothing but the rates matters."""
    buffers = layer.query_decay, layer.key_decay, layer.diagonal_decay
    made = lightning_decays(layer.slope_rate.float(), layer.block_size)
    return all(
        mine.shape == theirs.shape and torch.allclose(mine.float(), theirs, atol=2 * torch.finfo(mine.dtype).eps)
        for mine, theirs in zip(buffers, made, strict=True)
    )


def lightning_samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A layer and arguments for so many tokens: blocks of several sizes, decays near 0 and 1, and a mask of padding."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for fade, block, mask in ((1e-3, 16, False), (0.5, 64, True), (5.0, 256, False)):
        x = torch.randn(1, tokens, 5, generator=generator).double()
        padding = torch.rand(1, tokens, generator=generator) < 0.8 if mask else None
        found.append(((_Lightning(fade, block, generator), x, (x, x), padding), {}))
    return found
