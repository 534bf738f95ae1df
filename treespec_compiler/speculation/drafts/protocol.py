"""What a draft is: where proposals come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from ..policies.protocol import Limits, TreePolicy
from ..proposal import Proposal
from ..sampling.chance import Chance
from ..sampling.samplers import ChildSampler
from ..sampling.settings import Sampling
from ..slots import KEPT, Slot, Slots
from ..work import Working

if TYPE_CHECKING:
    from ...program.cache import TreeCache
    from ...program.tree_program import TreeProgram


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a draft must know before a request begins."""

    vocab_size: int
    """The target's: ids from here on must not be proposed."""
    max_tokens: int
    """Prompt and new tokens together."""
    max_nodes: int
    """Nodes of the largest tree."""
    needs_q: bool = False
    sampling: Sampling | None = None
    """How the target is sampled; None: greedily, by its own logits. Drafts are free to guess by it or not."""
    sampler: ChildSampler | None = None
    """How children are to be chosen from the draft's processed distribution. A draft that chooses them without chance
    leaves `proposal.draws` empty, and every verifier stays lossless."""
    chance: Chance | None = None
    """Whom to ask for randomness."""
    remember: bool = True
    """Whether what earlier requests left may be used. Not where the user gave a seed: it must give the same sample
    whatever went before, and a rule's chance depends on what is proposed."""
    prompt: Sequence[int] = ()
    target: TreeProgram | None = None
    """The target's program and cache, for drafts that run on them."""
    cache: TreeCache | None = None
    slot: int = 0
    """Of `cache`: the request's."""
    slots: Slots = KEPT
    """Where to take slots of other caches."""

    @property
    def by_logits(self) -> bool:
        """Whether the children wanted are those with the largest logits: temperature and its like keep the order."""
        if self.sampling is None or self.sampler is None:
            return True
        return self.sampler.kind == "top-k" and not self.sampling.reorders


class DraftSession(Protocol):
    """One request's drafting."""

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal | Working[Proposal]:
        """A tree whose node 0 is the newest accepted token.

        A draft that runs programs yields what it wants run (`speculation.work`), so that requests are run together.
        """
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens are final (the prompt first); the last one is the next tree's root."""
        ...

    def close(self) -> None:
        """The request is over; free what it held."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A session that learns from what verification computes anyway."""

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        """The target's logits [n, V] after each of `tokens` (the tree's nodes; first the prompt's last token). They are
        valid until it returns."""
        ...


@runtime_checkable
class HiddenReader(Protocol):
    """A session that reads the target's hidden states of accepted tokens, which verification computes anyway."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of outputs of the target's, as in `TreeProgram.verify`."""
        ...

    def read(self, hidden: Mapping[str, Tensor]) -> None:
        """Of the prompt's tokens at first, then of each tree's accepted path, the root included: [n, D] by name, valid
        until it returns. `accept` follows, with the tokens behind these (at first with the prompt before them)."""
        ...


@runtime_checkable
class Suspends(Protocol):
    """A session that can give back what it holds in caches while its request waits. Others keep it."""

    def suspend(self) -> None:
        """Give it back, in the middle of a proposal too. `resume` follows, or `close`."""
        ...

    def resume(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Go on: `slot` is the request's present one, `tokens` everything accepted so far, the prompt first."""
        ...

    def room(self, nodes: int) -> tuple[Slot | None, TreeProgram, int]:
        """Its slot (None: it will take one), and for how many tokens behind those in it a step of `nodes` nodes needs
        room."""
        ...


@runtime_checkable
class Draft(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def prefill_seconds(self) -> float:
        """Seconds spent on running prompts so far, in all sessions."""
        ...

    @property
    def compile_seconds(self) -> float: ...

    def open(self, request: DraftRequest) -> DraftSession: ...


class ProgramDraft(Protocol):
    """A draft that runs a tree program."""

    name: str
    prefill_seconds: float

    @property
    def program(self) -> TreeProgram: ...
