"""Acceptance where the logits are: one small tensor is read back, not the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ir.accept import FIELDS
from ...ir.device import profile
from ...ir.private_torch import OpOverload
from ...ir.registry import best_kernel
from ...ir.stochastic_accept import FIELDS as CHANCE_FIELDS
from ...ir.stochastic_accept import RULES
from ..proposal import Proposal
from ..sampling.chance import SeededChance
from ..sampling.device_rows import stays_on_device
from .greedy import Verdict, check_one_root
from .near_ties import TOLERANCE

if TYPE_CHECKING:
    from ...program.tree_program import TreeProgram


def accept_kernel(program: TreeProgram, op: OpOverload, dtype: torch.dtype) -> OpOverload | None:
    """Who accepts on the program's device; None: rows of logits are read back."""
    if not stays_on_device(program) or program.options.kernels != "auto":
        return None
    kernel = best_kernel(op, program.device, dtype)
    return None if kernel is None else kernel.target


def accept_greedily(kernel: OpOverload, proposal: Proposal, logits: Tensor) -> Verdict:
    """What `GreedyVerifier` says of logits [N, V], by an implementation of `treespec::greedy_accept`."""
    check_one_root(proposal)
    count = len(proposal.tokens)
    tokens, parents, offsets = _integers([proposal.tokens, proposal.parents, [0, count]], logits.device)
    read = kernel(logits, tokens, parents, offsets, TOLERANCE.get(logits.dtype, 0.0)).tolist()
    accepted, bonus, unusable, near = read[:FIELDS]
    return Verdict(read[FIELDS : FIELDS + accepted], bonus, unusable, bool(near))


def takes(rule: str, proposal: Proposal) -> bool:
    """Whether `treespec::stochastic_accept` knows the rule for draws like these."""
    if rule != "traversal":
        return rule in RULES
    groups = [draws for below in proposal.drawn().values() for draws in below]
    children = [child for draws in groups for child in draws.children]
    again = any(draws.replacement and draws.q is not None and len(draws.children) > 1 for draws in groups)
    return not again and len(children) == len(set(children))


def accept_by_chance(
    kernel: OpOverload, rule: str, proposal: Proposal, p: Tensor, usable: Tensor, chance: SeededChance
) -> Verdict:
    """What the rule of this name says, by an implementation of `treespec::stochastic_accept`.

    p [N, V]: the target's distributions; usable [N]: whether each is one. `Verdict.unusable` is the depth of the first
    node that has none, of the path's, and of all for traversal, which looks at nodes that it does not accept.
    """
    check_one_root(proposal)
    device, count = p.device, len(proposal.tokens)
    rows: list[Tensor] = []
    offsets, draw_rows, draw_q = [0], [], []
    drawn = proposal.drawn() if rule != "naive" else {}
    for node in range(count):
        for draws in drawn.get(node, ()):
            draw_rows += draws.children
            draw_q += [len(rows) if draws.q is not None else -1] * len(draws.children)
            if draws.q is not None:
                rows.append(draws.q.to(device) if isinstance(draws.q, Tensor) else torch.from_numpy(draws.q).to(device))
        offsets.append(len(draw_rows))
    integers = _integers([proposal.tokens, proposal.parents, [0, count], offsets, draw_rows, draw_q], device)
    uniforms = _to(torch.from_numpy(chance.peek(count + len(draw_rows))[None]), device)
    q = torch.stack(rows) if rows else p.new_empty(0, p.shape[1])
    out = kernel(p, q, *integers, uniforms, rule, 1 + max(proposal.depths))
    read = torch.cat([out, usable.long()]).tolist()
    accepted, bonus, used = read[:CHANCE_FIELDS]
    chance.skip(used)
    path = read[CHANCE_FIELDS : CHANCE_FIELDS + accepted]
    good, seen = read[CHANCE_FIELDS + count :], range(count) if rule == "traversal" else path
    return Verdict(path, bonus, next((proposal.depths[node] for node in seen if not good[node]), -1))


def _integers(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Each list as an int64 tensor on the device, by one copy."""
    flat = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int64)
    return _to(flat, device).split([len(numbers) for numbers in lists])


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if profile(device).pinned_copies else x.to(device)
