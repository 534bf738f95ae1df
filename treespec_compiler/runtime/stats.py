"""What a generation did and where its time went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..speculation.proposal import Proposal

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(slots=True)
class Count:
    """How nodes of one depth, or of one rank among their siblings, fared."""

    proposed: int = 0
    tried: int = 0
    """By rank: nodes proposed below an accepted node, the only ones that could be accepted. By depth: steps that had
    such nodes."""
    accepted: int = 0

    def add(self, other: Count) -> None:
        self.proposed += other.proposed
        self.tried += other.tried
        self.accepted += other.accepted

    @property
    def rate(self) -> float:
        """Accepted given that the parent was."""
        return self.accepted / self.tried if self.tried else 0.0


def _lengthen(counts: list[Count], length: int) -> None:
    while len(counts) < length:
        counts.append(Count())


COUNTS = (
    "prompt_tokens",
    "cached_tokens",
    "tokens",
    "steps",
    "step_tokens",
    "accepted",
    "nodes",
    "compile_seconds",
    "unusable_draft_rows",
    "near_ties",
)
"""What may be added up over generations."""


@dataclass(slots=True)
class Stats:
    """Counts and seconds of one `generate` or `stream`.

    A step is one verification by the target. It yields the accepted nodes and one *bonus* token, the target's own next
    one; `tokens_per_step` counts the bonus token, so it is at least 1. The first new token comes from the prompt's
    logits and belongs to no step.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens whose K/V other requests of an engine had computed."""
    tokens: int = 0
    """New tokens, the first one included."""
    steps: int = 0
    step_tokens: int = 0
    """New tokens that came from steps."""
    accepted: int = 0
    """Tokens of the draft that became output."""
    nodes: int = 0
    """Tree nodes verified, the roots included."""
    accepted_by_depth: list[Count] = field(default_factory=list)
    """Entry d: nodes d + 1 levels below the root."""
    accepted_by_rank: list[Count] = field(default_factory=list)
    """Entry r: nodes that the draft thought the r-th likeliest child, from 0."""
    prefill_seconds: float = 0.0
    draft_prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    """Target forward passes and the choice of the accepted path."""
    commit_seconds: float = 0.0
    """Keeping the accepted path in the target's and the drafts' caches."""
    step_seconds: float = 0.0
    """All steps, bookkeeping included; compilation and the drafts' prefill are not."""
    compile_seconds: float = 0.0
    """Spent on compilation during this call; in none of the other figures."""
    weight_wait_seconds: float = 0.0
    """Of prefill and verification: the cores stood still for streamed weights (option `offload`)."""
    weight_read_bytes: int = 0
    """Of weights that were read while this ran, beside computing and drafting, whoever needed them."""
    unusable_draft_rows: int = 0
    """Rows of a draft with NaN or infinite logits: nothing was proposed there."""
    seed: int | None = None
    """The seed that gives this output again; None for greedy decoding, and where trees follow earlier calls too."""
    near_ties: int = 0
    """Steps where the target's two best logits were closer than its precision (bf16 and fp16 only)."""
    finish_reason: FinishReason | None = None
    fallback: str | None = None
    """Why the plain loop ran instead of a tree program, if it did."""
    program_from_cache: bool = False
    """Whether the target's program was found saved on disk (option `program_cache`)."""
    peak_bytes: int = 0
    """The most memory that the process had held at once when the target's program was ready; 0: nobody knows."""
    model_bytes: int = 0
    """Of the target's parameters and buffers."""
    packed_bytes: int = 0
    """Of weights that the target's program keeps beside them."""

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a step, the bonus token included."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / self.steps if self.steps else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Step time outside draft, verification and commit."""
        return max(0.0, self.step_seconds - self.draft_seconds - self.verify_seconds - self.commit_seconds)

    @property
    def weight_rate(self) -> float:
        """Bytes a second of weights that were read, over the whole call; what was read ahead before it counts not."""
        return self.weight_read_bytes / self.seconds if self.weight_read_bytes and self.seconds else 0.0

    @property
    def seconds(self) -> float:
        """Prefill and steps, without compilation."""
        return self.prefill_seconds + self.draft_prefill_seconds + self.step_seconds

    def record(self, proposal: Proposal, path: list[int]) -> None:
        """Count one step's nodes; `path` holds the accepted ones, the root first."""
        count = len(proposal.tokens)
        self.steps += 1
        self.nodes += count
        self.accepted += len(path) - 1
        self.unusable_draft_rows += proposal.unusable
        if count == 1:
            return
        by_depth, by_rank, accepted = self.accepted_by_depth, self.accepted_by_rank, set(path)
        depths, ranks = proposal.depths, proposal.ranks
        _lengthen(by_depth, max(depths))
        _lengthen(by_rank, max(ranks) + 1)
        for depth in depths[1:]:
            by_depth[depth - 1].proposed += 1
        for rank in ranks[1:]:
            by_rank[rank].proposed += 1
        tried = [node for node, parent in enumerate(proposal.parents) if parent in accepted]
        for depth in {depths[node] for node in tried}:
            by_depth[depth - 1].tried += 1
        for node in tried:
            by_rank[ranks[node]].tried += 1
        for node in path[1:]:
            by_depth[depths[node] - 1].accepted += 1
            by_rank[ranks[node]].accepted += 1

    @classmethod
    def total(cls, parts: Iterable[Stats]) -> Stats:
        """Counts and compilation of several generations; times of what ran side by side are not added up."""
        total = cls()
        for stats in parts:
            for name in COUNTS:
                setattr(total, name, getattr(total, name) + getattr(stats, name))
            for mine, others in (
                (total.accepted_by_depth, stats.accepted_by_depth),
                (total.accepted_by_rank, stats.accepted_by_rank),
            ):
                _lengthen(mine, len(others))
                for count, other in zip(mine, others):
                    count.add(other)
            total.fallback = total.fallback or stats.fallback
        return total

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values, the derived figures too."""
        derived = ("tokens_per_step", "nodes_per_step", "overhead_seconds", "seconds", "weight_rate")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        rates = " ".join(f"{count.rate:.2f}" for count in self.accepted_by_depth) or "-"
        ranks = " ".join(f"{count.rate:.2f}" for count in self.accepted_by_rank) or "-"
        lines = [
            f"{self.tokens} tokens in {self.steps} steps: {self.tokens_per_step:.2f} tokens per step (bonus token "
            f"included), {self.nodes_per_step:.1f} nodes per step, finished by {self.finish_reason}",
            f"accepted given the parent was, by depth: {rates}; by rank: {ranks}",
            f"seconds: steps {self.step_seconds:.3f} (draft {self.draft_seconds:.3f}, verify "
            f"{self.verify_seconds:.3f}, commit {self.commit_seconds:.3f}, overhead {self.overhead_seconds:.3f}), "
            f"prefill {self.prefill_seconds:.3f}, draft prefill {self.draft_prefill_seconds:.3f}, "
            f"compile {self.compile_seconds:.3f}",
        ]
        if self.weight_read_bytes:
            lines.append(
                f"streamed weights: waited {self.weight_wait_seconds:.3f} seconds for them, read "
                f"{self.weight_read_bytes:,} bytes, {self.weight_rate / 1e9:.2f} GB/s"
            )
        if self.unusable_draft_rows:
            lines.append(f"{self.unusable_draft_rows} nodes without proposals: NaN or infinite logits of the draft")
        if self.peak_bytes:
            lines.append(
                f"memory: {self.peak_bytes / 1e6:,.0f} MB at most until the program was ready, the model is "
                f"{self.model_bytes / 1e6:,.0f} MB of it and its packed form {self.packed_bytes / 1e6:,.0f} MB"
            )
        if self.near_ties:
            lines.append(f"near ties: {self.near_ties} steps")
        if self.fallback:
            lines.append(f"fallback to the plain loop: {self.fallback}")
        return "\n".join(lines)
