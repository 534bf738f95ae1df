"""EAGLE-3: one decoder layer that reads the target's low, middle and high hidden states (Li et al., arXiv 2503.01840).

At place i the layer reads the embedding of token i + 1 beside the fused hidden states of token i, and guesses token
i + 2. In a tree, where the target has not been yet, the layer's own output at the parent stands for the fused states
(section 3.1 of the paper). EAGLE-3.1 (arXiv 2605.09992) normalises each hidden state before they are fused, and the
output that is handed on. Published heads come in two layouts of names (`midlayer.*` and `layers.0.*`) and with two
kinds of configuration: flat, or that of the package `speculators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ir.private_torch import OpOverload
from .checkpoint import Tensors, unreadable
from .products import HeadProduct
from .rotation import frequencies, rotated

LAYOUTS = ("midlayer", "layers.0")
TAPS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class HeadShape:
    """What config.json says."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    vocab: int
    """Ids of the target."""
    draft_vocab: int
    target_hidden: int
    """Width of the hidden states that are read."""
    norm_before_residual: bool
    """Whether the fused states go on normalised beside the attention."""
    norm_before_fc: bool
    """One norm over all fused states together."""
    fc_norm: bool
    """A norm for each of them."""
    norm_output: bool
    """Whether the layer's output is handed on behind the last norm."""

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], target_hidden: int) -> HeadShape:
        """For a target whose hidden states have that width. Raises UnreadableModel."""
        layer = config.get("transformer_layer_config", config)
        kind = config.get("speculators_model_type", "eagle3")
        if kind != "eagle3":
            raise unreadable(folder, f"a speculator of type {kind!r}", "an EAGLE-3 head")
        if layer.get("num_hidden_layers", 1) != 1 or layer.get("hidden_act", "silu") != "silu":
            got = f"{layer.get('num_hidden_layers')} layers with activation {layer.get('hidden_act')!r}"
            raise unreadable(folder, got, "one layer with silu")
        try:
            hidden, heads = int(layer["hidden_size"]), int(layer["num_attention_heads"])
            vocab = int(layer["vocab_size"])
            found = cls(
                hidden,
                heads,
                int(layer.get("num_key_value_heads") or heads),
                int(layer.get("head_dim") or hidden // heads),
                int(layer["intermediate_size"]),
                float(layer["rms_norm_eps"]),
                vocab,
                int(config.get("draft_vocab_size") or vocab),
                int(config.get("target_hidden_size") or target_hidden),
                bool(config.get("norm_before_residual", False)),
                bool(config.get("norm_before_fc", False)),
                bool(config.get("fc_norm", False)),
                bool(config.get("norm_output", False)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise unreadable(folder, f"config.json with {error!r}", "the sizes of a Llama layer") from error
        found._check(folder, target_hidden)
        return found

    def _check(self, folder: Path, target_hidden: int) -> None:
        if self.target_hidden != target_hidden:
            got = f"a head for hidden states of {self.target_hidden}"
            raise unreadable(folder, got, f"one for this target's, of {target_hidden}")
        if self.norm_before_fc and self.fc_norm:
            raise unreadable(folder, "norm_before_fc and fc_norm", "one of them")
        if self.head_dim % 2 or self.heads % self.kv_heads:
            got = f"{self.heads} heads of {self.head_dim} over {self.kv_heads} key heads"
            raise unreadable(folder, got, "even heads, a whole number of them for each key head")


def taps(folder: Path, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """After how many of the target's layers its hidden states are read: what config.json says (published engines take
    them before layer k), else low, middle and high. Raises UnreadableModel."""
    said = config.get(TAPS) or (config.get("eagle_config") or {}).get(TAPS)
    found = (2, layers // 2, layers - 3) if said is None else said
    whole = isinstance(found, (list, tuple)) and all(type(k) is int and 0 <= k <= layers for k in found)
    if not whole or not found or len(set(found)) != len(found):
        raise unreadable(folder, f"{TAPS} {found}", f"different numbers from 0 to {layers}, this target's layers")
    return tuple(found)


class Eagle3:
    """The head's tensors and what it computes. T tokens, h its width, D the target's."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        taps: int,
        target_hidden: int,
        tensors: Tensors,
        kernel: OpOverload | None = None,
    ) -> None:
        """Of a head that reads so many hidden states of that width; all of `tensors` are taken. Without a kernel for
        its products (`products.product_kernel`) gradients reach them. Raises UnreadableModel."""
        self.shape = shape = HeadShape.read(folder, config, target_hidden)
        self._taps = taps
        h, fused = shape.hidden, target_hidden * taps
        layer = next((name for name in LAYOUTS if f"{name}.hidden_norm.weight" in tensors), LAYOUTS[0])
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._fc = HeadProduct(tensors.take("fc.weight", h, fused), tensors.perhaps("fc.bias", h), kernel)
        self._fc_norms = self._norms_of_fused(tensors)
        self._embedding_norm = tensors.take(f"{layer}.input_layernorm.weight", h)
        self._hidden_norm = tensors.take(f"{layer}.hidden_norm.weight", h)
        self._mlp_norm = tensors.take(f"{layer}.post_attention_layernorm.weight", h)
        named = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
        qkv = torch.cat([tensors.take(f"{attention}.{name}.weight", n, 2 * h) for name, n in named])
        biases = [tensors.perhaps(f"{attention}.{name}.bias", n) for name, n in named]
        self._qkv = HeadProduct(qkv, _joined(folder, f"{attention}'s biases", biases), kernel)
        o, o_bias = tensors.take(f"{attention}.o_proj.weight", h, q), tensors.perhaps(f"{attention}.o_proj.bias", h)
        self._o = HeadProduct(o, o_bias, kernel)
        gate_up = [tensors.take(f"{mlp}.{name}.weight", shape.intermediate, h) for name in ("gate_proj", "up_proj")]
        self._gate_up = HeadProduct(torch.cat(gate_up), None, kernel)
        self._down = HeadProduct(tensors.take(f"{mlp}.down_proj.weight", h, shape.intermediate), None, kernel)
        self._norm = tensors.take("norm.weight", h)
        self._head = HeadProduct(tensors.take("lm_head.weight", shape.draft_vocab, h), None, kernel)
        self.embedding = tensors.perhaps("embed_tokens.weight", shape.vocab, h)
        """None: the head was trained with the target's."""
        self.ids = _ids(folder, tensors, shape)
        """The target's id of each of the head's rows [draft vocabulary], int64; None: they are the target's."""
        tensors.finish()
        layer_config = config.get("transformer_layer_config", config)
        self._frequencies = frequencies(folder, layer_config, shape.head_dim).to(tensors.device)

    def _norms_of_fused(self, tensors: Tensors) -> list[Tensor]:
        shape = self.shape
        if shape.fc_norm:
            return [tensors.take(f"fc_norm.{i}.weight", shape.target_hidden) for i in range(self._taps)]
        if shape.norm_before_fc:
            return [tensors.take("input_norm.weight", shape.target_hidden * self._taps)]
        return []

    @property
    def weight_bytes(self) -> int:
        """Of what one call reads, a few rows of the embedding left out."""
        return sum(each.bytes for each in (self._qkv, self._o, self._gate_up, self._down, self._head))

    def zeros(self, count: int) -> Tensor:
        """Stand-ins for the target's hidden states [count, taps * D]."""
        return self._norm.new_zeros(count, self._fc.columns)

    def fused(self, hidden: Tensor) -> Tensor:
        """[T, taps * D], the target's hidden states side by side -> [T, h]."""
        if self._fc_norms:
            parts = hidden.chunk(len(self._fc_norms), -1)
            normed = [self._normed(part, norm) for part, norm in zip(parts, self._fc_norms, strict=True)]
            hidden = torch.cat(normed, -1)
        return self._fc(hidden)

    def projected(self, embedded: Tensor, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of embeddings and fused states [T, h] at places [T]: q [heads, T, E], k and v [key heads, T, E], and what
        goes on beside the attention [T, h]."""
        shape = self.shape
        normed = self._normed(hidden, self._hidden_norm)
        both = torch.cat([self._normed(embedded, self._embedding_norm), normed], -1)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        flat = self._qkv(both).unflatten(-1, (-1, shape.head_dim)).transpose(0, 1)
        q, k, v = flat.split(heads)
        angles = places[:, None].float() * self._frequencies
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return rotated(q, cos, sin), rotated(k, cos, sin), v, normed if shape.norm_before_residual else hidden

    def attended(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q over k and v [key heads, S, E], where `seen` [T, S] says: what logits are made of, and the
        output that stands for fused states at the next place, both [T, h]."""
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]
        x = beside + self._o(mixed.transpose(0, 1).flatten(1))
        gate, up = self._gate_up(self._normed(x, self._mlp_norm)).chunk(2, -1)
        x = x + self._down(F.silu(gate) * up)
        normed = self._normed(x, self._norm)
        return normed, normed if self.shape.norm_output else x

    def logits(self, normed: Tensor) -> Tensor:
        """[T, draft vocabulary] of the first of what `attended` gives. Of a prompt's rows the last one is enough."""
        return self._head(normed)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        # By hand: `F.rms_norm` takes five times as long for a row on a CPU.
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.eps)).to(x.dtype) * weight


def _joined(folder: Path, name: str, parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    if given and len(given) != len(parts):
        raise unreadable(folder, f"some of {name}", "all or none")
    return torch.cat(given) if given else None


def _ids(folder: Path, tensors: Tensors, shape: HeadShape) -> Tensor | None:
    """`d2t` holds the target's id less the row's number; `t2d`, whether a row stands for an id, says it again."""
    if "d2t" not in tensors:
        if shape.draft_vocab != shape.vocab:
            raise unreadable(folder, f"{shape.draft_vocab} rows for {shape.vocab} ids", "d2t, which ids they stand for")
        if "t2d" in tensors:
            tensors.raw("t2d", shape.vocab)
        return None
    ids = tensors.raw("d2t", shape.draft_vocab).long() + torch.arange(shape.draft_vocab)
    if len(ids.unique()) != len(ids) or int(ids.min()) < 0 or int(ids.max()) >= shape.vocab:
        raise unreadable(folder, "a d2t with ids that are twice there or none", f"different ids below {shape.vocab}")
    if "t2d" in tensors:
        stands = tensors.raw("t2d", shape.vocab).bool().nonzero().flatten()
        if not torch.equal(stands, ids.sort().values):
            raise unreadable(folder, "a t2d that contradicts d2t", "the same ids in both")
    return ids.to(tensors.device)
