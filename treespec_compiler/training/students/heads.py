"""What heads on the target's hidden states have in common while they learn: one layer, a reduced vocabulary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...program.tree_program import TreeProgram
from ...speculation.drafts.heads.checkpoint import Tensors
from ...speculation.drafts.heads.eagle3 import TAPS, Eagle3
from ...user_cache import replacing, write_whole
from ..losses import cross_entropy, rows_of
from ..texts import WrittenText
from ..unrolled import unrolled

EPSILON = 1e-5


@dataclass(frozen=True)
class HeadPlan:
    """Of a head of one layer."""

    depth: int = 5
    """Places behind the root that it learns to guess."""
    vocabulary: int = 8192
    """The target's ids that it can guess: those that the target wrote most often. All of them, if there are no more."""
    intermediate: int | None = None
    """Width of its feed-forward part; None: 8/3 of the hidden states' width, in 32s."""
    taps: tuple[int, ...] | None = None
    """After how many of the target's layers it reads hidden states; None: low, middle and high."""
    decay: float = 0.8
    """What the loss at each depth counts, in parts of that at the depth before."""
    follow: int = 32
    """Rank of a parallel head's correction by the token before."""


def default_taps(layers: int) -> tuple[int, ...]:
    """Low, middle and high, as EAGLE-3's own where there are enough layers."""
    published = (2, layers // 2, layers - 3)
    if layers >= 6:
        return published
    return tuple(sorted({min(1, layers - 1), layers // 2, layers - 1}))


def commonest(answers: Iterable[Tensor], count: int, vocab: int) -> Tensor | None:
    """The ids that occur most often, ascending [count]; of equal ones the smaller. None: all of `vocab`."""
    if count >= vocab:
        return None
    times = torch.zeros(vocab, dtype=torch.int64)
    for tokens in answers:
        times += torch.bincount(tokens, minlength=vocab)
    return times.sort(descending=True, stable=True).indices[:count].sort().values


@dataclass(frozen=True)
class HeadSizes:
    """What a head must fit to."""

    width: int
    """Of the target's hidden states and embeddings, and of the head's own."""
    vocab: int
    taps: tuple[int, ...]

    @classmethod
    def of(cls, program: TreeProgram, embedding: Tensor, plan: HeadPlan) -> HeadSizes:
        """Raises InvalidOption for taps that the target does not have."""
        layers = len(program.sites)
        taps = plan.taps or default_taps(layers)
        if len(set(taps)) != len(taps) or min(taps) < 0 or max(taps) > layers:
            raise InvalidOption(name="taps", got=list(taps), expected=f"different numbers from 0 to {layers}")
        return cls(embedding.shape[1], program.vocab_size, taps)


def configuration(sizes: HeadSizes, plan: HeadPlan, rows: int) -> dict[str, Any]:
    """A flat config.json of EAGLE-3.1: the norms keep hidden states of any size apart and the outputs alike."""
    head_dim = next(size for size in (64, 32, 16, 8, 4, 2, 1) if sizes.width % size == 0)
    if head_dim % 2:
        raise InvalidOption(name="model", got=f"hidden states of {sizes.width}", expected="an even width")
    heads = sizes.width // head_dim
    group = next((n for n in range(2, heads) if heads % n == 0), 1)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": sizes.width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "head_dim": head_dim,
        "intermediate_size": plan.intermediate or math.ceil(sizes.width * 8 / 3 / 32) * 32,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "rope_theta": 10000.0,
        "vocab_size": sizes.vocab,
        "draft_vocab_size": rows,
        "fc_norm": True,
        "norm_output": True,
        TAPS: list(sizes.taps),
    }


def fresh(config: Mapping[str, Any], target_rows: Tensor | None, seed: int) -> dict[str, Tensor]:
    """Weights to begin with, on the CPU: the highest hidden states go straight to the head, which is the target's
    `target_rows` [rows, h] where it has such ones; what the layer adds is nothing yet."""
    h, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, mlp, taps = config["head_dim"], config["intermediate_size"], len(config[TAPS])
    draw = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    rows = weight(config["draft_vocab_size"], h)
    found = {
        "fc.weight": torch.cat([0.1 * weight(h, (taps - 1) * h), torch.eye(h)], 1),
        "midlayer.self_attn.q_proj.weight": weight(heads * head_dim, 2 * h),
        "midlayer.self_attn.k_proj.weight": weight(kv * head_dim, 2 * h),
        "midlayer.self_attn.v_proj.weight": weight(kv * head_dim, 2 * h),
        "midlayer.self_attn.o_proj.weight": torch.zeros(h, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": weight(mlp, h),
        "midlayer.mlp.up_proj.weight": weight(mlp, h),
        "midlayer.mlp.down_proj.weight": torch.zeros(h, mlp),
        "lm_head.weight": rows if target_rows is None else target_rows.detach().cpu().float().clone(),
    }
    for name in ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm"):
        found[f"{name}.weight"] = torch.ones(h)
    return found | {f"fc_norm.{i}.weight": torch.ones(h) for i in range(taps)}


class HeadStudent:
    """A head that learns to go on from its own outputs (`training.unrolled`)."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        ids: Tensor | None,
        embedding: Tensor,
        plan: HeadPlan,
    ) -> None:
        """`ids` [rows]: the target's ids it can guess; None: all. `embedding` [ids, h] is the target's."""
        self._config, self._plan = dict(config), plan
        self._embedding = embedding.detach().float()
        device = embedding.device
        self.weights = {name: weight.to(device).requires_grad_() for name, weight in weights.items()}
        self._rows = None if ids is None else rows_of(ids.to(device), config["vocab_size"])
        self._ids = None if ids is None else ids.to(device)
        self._tables = {} if ids is None else tables(ids, config["vocab_size"])

    def head(self) -> Eagle3:
        """Of the weights as they are: the same code computes what is learned and what is guessed later."""
        width = self._config["hidden_size"]
        named = {**{name: self.weights[name] for name in self._of_layer()}, **self._tables}
        tensors = Tensors(Path("(a head in training)"), named, torch.float32, self._embedding.device)
        return Eagle3(Path("(a head in training)"), self._config, len(self._config[TAPS]), width, tensors)

    def _of_layer(self) -> Sequence[str]:
        return list(self.weights)

    def logits(self, text: WrittenText) -> Sequence[Tensor]:
        """By depth [R - d, rows]."""
        tokens = text.tokens[text.prompt : text.prompt + text.roots]

        def inner(depth: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
            return self._embedding[tokens[depth:]], outputs

        return list(unrolled(self.head(), self._embedding, text, self._plan.depth, inner))

    def loss(self, text: WrittenText) -> Tensor:
        wanted = text.ids if self._rows is None else self._rows[text.ids]
        total = self._embedding.new_zeros(())
        scale = sum(self._plan.decay**d for d in range(self._plan.depth))
        for d, logits in enumerate(self.logits(text)):
            each = cross_entropy(logits, wanted[d:], text.log_probabilities[d:])
            if text.counts is not None:
                each = each * text.counts[: len(each)]
            total = total + each.sum() * (self._plan.decay**d / scale)
        return total

    @torch.no_grad()
    def hits(self, text: WrittenText) -> Tensor:
        found = torch.zeros(text.roots, self._plan.depth, dtype=torch.bool)
        for d, logits in enumerate(self.logits(text)):
            best = logits.argmax(1)
            guessed = best if self._ids is None else self._ids[best]
            found[: len(best), d] = (guessed == text.ids[d:, 0]).cpu()
        return found

    def bytes_of(self, tokens: int) -> int:
        config, depth = self._config, self._plan.depth
        # logits, their gradient and its copy; attention's mask and weights a head; about a dozen vectors a row
        a_row = 3 * 4 * config["draft_vocab_size"] + 4 * (10 * config["intermediate_size"] + 24 * config["hidden_size"])
        seen = tokens * tokens * depth * (1 + 8 * config["num_attention_heads"]) * (depth + 1) // 2
        fused = 4 * tokens * 3 * len(config[TAPS]) * config["hidden_size"]
        return tokens * depth * a_row + seen + fused

    def write(self, folder: Path, about: Mapping[str, Any]) -> None:
        """As the drafts `eagle3:` and `parallel:` read it."""
        save_head(folder, {**self._config, "training": about}, {**self.weights, **self._tables})


def tables(ids: Tensor, vocab: int) -> dict[str, Tensor]:
    """`d2t` and `t2d` of ascending ids, as published heads have them."""
    ids = ids.cpu()
    known = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    return {"d2t": ids - torch.arange(len(ids)), "t2d": known}


def save_head(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`config.json` and `model.safetensors`, numbers in bfloat16. The tensors first: a folder is read by its config."""
    from safetensors.torch import save_file

    kept = {
        name: (x.detach().bfloat16() if x.is_floating_point() else x.detach()).cpu().contiguous()
        for name, x in tensors.items()
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file(kept, str(temporary))
    (folder / "model.safetensors").chmod(0o644)  # temporary files are their owner's alone
    write_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")
