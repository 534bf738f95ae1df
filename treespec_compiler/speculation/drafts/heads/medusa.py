"""Medusa: several heads on the target's last hidden state, the i-th for the i-th token behind the root.

Cai et al., arXiv 2401.10774. What the heads say does not depend on the path, so that all of a tree is known at once:
level i has the likeliest ids of head i under every node above (the Cartesian product of section 2.1.2), as many as the
policy wants.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import InvalidOption
from ....ir.outputs import HEAD
from ....program.tree_program import TreeProgram
from ...cost.latency import LatencyTable, Point
from ...policies.protocol import Limits, TreePolicy
from ...proposal import Proposal
from ..protocol import DraftRequest
from ..registry import DraftContext, register_draft
from ..retrieval import grown
from .checkpoint import Tensors, named_folder, read_config, read_tensors, unreadable
from .loaded import width_of

USAGE = '"medusa:FOLDER" (published heads)'
WIDEST = 10
"""Ids of a head that a tree may have; published trees have at most ten."""
TIMED_CALLS = 5


class MedusaHeads:
    """Tensors of the heads, side by side: blocks [i][j] of x + silu(W x + b), then rows of the vocabulary."""

    def __init__(self, folder: Path, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UnreadableModel where the folder holds no heads for hidden states of `width` and `vocab` ids."""
        config = read_config(folder)
        try:
            self.count, blocks = int(config["medusa_num_heads"]), int(config.get("medusa_num_layers", 1))
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(folder, f"config.json with {error!r}", "medusa_num_heads and medusa_num_layers") from error
        if self.count < 1 or blocks < 0:
            raise unreadable(folder, f"{self.count} heads of {blocks} blocks", "one or more")
        found = read_tensors(folder)
        named = {name.removeprefix("medusa_head."): tensor for name, tensor in found.items()}
        tensors = Tensors(folder, named, dtype, device)
        # Blocks of one depth are one batched product, as are the heads' rows: [heads, out, in].
        self._blocks = [
            (
                torch.stack([tensors.take(f"{i}.{j}.linear.weight", width, width) for i in range(self.count)]),
                torch.stack([tensors.take(f"{i}.{j}.linear.bias", width) for i in range(self.count)])[:, None],
            )
            for j in range(blocks)
        ]
        self._rows = torch.cat([tensors.take(f"{i}.{blocks}.weight", vocab, width) for i in range(self.count)])
        self._rows = self._rows.view(self.count, vocab, width)
        tensors.finish()

    @property
    def vocab(self) -> int:
        return self._rows.shape[1]

    @property
    def width(self) -> int:
        """Of the hidden states that they read."""
        return self._rows.shape[2]

    def logits(self, hidden: Tensor) -> Tensor:
        """[D], what the target's head reads -> [heads, V]."""
        x = hidden.expand(self.count, 1, -1)
        for weight, bias in self._blocks:
            x = x + F.silu(torch.baddbmm(bias, x, weight.transpose(1, 2)))
        return torch.bmm(x, self._rows.transpose(1, 2))[:, 0]


class MedusaDraft:
    """Guesses by heads on what the target's own head reads. Made for one target."""

    prefill_seconds = 0.0

    def __init__(self, target: TreeProgram, heads: MedusaHeads, name: str, seconds: float = 0.0) -> None:
        self.target, self.learned_as, self.name, self.compile_seconds = target, heads, name, seconds
        self._latency: LatencyTable | None = None

    def latency(self) -> LatencyTable:
        """Of the one call that a tree takes, whatever its rows: shared among the calls that a policy counts."""
        if self._latency is None:
            seconds = []
            with torch.inference_mode():
                like = torch.zeros(self.learned_as.width, dtype=self.target.dtype, device=self.target.device)
                for _ in range(TIMED_CALLS):
                    began = perf_counter()
                    self.learned_as.logits(like)[0, 0].item()  # a device is waited for
                    seconds.append(perf_counter() - began)
            self._latency = LatencyTable([Point(rows, 0, 1, min(seconds) / self.learned_as.count) for rows in (1, 2)])
        return self._latency

    def open(self, request: DraftRequest) -> MedusaSession:
        if request.target is not self.target:
            raise InvalidOption(name="draft", got=f"{self.name} of another model", expected="the target it reads")
        return MedusaSession(self.name, self.learned_as, request)


class MedusaSession:
    """One request's last hidden state."""

    reads = (HEAD,)

    def __init__(self, name: str, heads: MedusaHeads, request: DraftRequest) -> None:
        self._name, self._heads, self._needs_q = name, heads, request.needs_q
        self._root = -1
        self._hidden: Tensor | None = None  # of the token before the root
        self._levels: list[list[tuple[int, int, float]]] | None = None

    def read(self, hidden: Mapping[str, Tensor]) -> None:
        self._hidden, self._levels = hidden[HEAD][-1].clone(), None

    def accept(self, tokens: Sequence[int]) -> None:
        self._root = tokens[-1]

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        proposal = Proposal.root(self._root, q=self._needs_q, proposer=self._name)
        if self._levels is None:
            self._levels = self._likeliest()
        return grown(proposal, 0, self._following, policy, limits)

    def _following(self, depth: int, k: int) -> list[tuple[int, int, float]]:
        assert self._levels is not None
        return self._levels[depth][:k] if depth < len(self._levels) else []

    def _likeliest(self) -> list[list[tuple[int, int, float]]]:
        """By depth: (id, the next depth, its probability), best first; none from a head that is not finite on."""
        assert self._hidden is not None
        best, ids = self._heads.logits(self._hidden).float().softmax(-1).topk(min(WIDEST, self._heads.vocab))
        found = []
        for depth, (shares, tokens) in enumerate(zip(best.tolist(), ids.tolist(), strict=True)):
            if shares[0] != shares[0]:  # softmax makes NaN of what is not finite
                break
            found.append([(token, depth + 1, share) for token, share in zip(tokens, shares, strict=True)])
        return found

    def close(self) -> None:
        """Nothing is held."""
        self._hidden = None


_HEADS: weakref.WeakKeyDictionary[TreeProgram, dict[tuple[str, int], MedusaHeads]] = weakref.WeakKeyDictionary()


def _named(argument: str, context: DraftContext) -> MedusaDraft:
    """The heads of a folder, kept with the target as long as its configuration is not written anew."""
    began, target = perf_counter(), context.target
    folder, key = named_folder(argument, "medusa", USAGE)
    kept = _HEADS.setdefault(target, {})
    if key not in kept:
        kept[key] = MedusaHeads(folder, width_of(target, HEAD), target.vocab_size, target.dtype, target.device)
    return MedusaDraft(target, kept[key], f"medusa:{folder.name}", perf_counter() - began)


register_draft("medusa", _named, usage=USAGE)
