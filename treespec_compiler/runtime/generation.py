"""One request: propose, verify, commit. It yields what it wants run, and is sent the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import DraftFailed
from ..ir.verify import LOGITS
from ..speculation.drafts.protocol import Draft, DraftRequest, DraftSession, HiddenReader, Learner, Suspends
from ..speculation.policies.protocol import Control, Limits, TreePolicy
from ..speculation.proposal import Proposal
from ..speculation.sampling.chance import Mark
from ..speculation.slots import KEPT, Slot, Slots
from ..speculation.verifiers.judge import Judge
from ..speculation.verifiers.near_ties import TOLERANCE, near_tie
from ..speculation.work import Nodes, Prompt, Working
from ..tree import TokenTree
from .decoding import Drawing
from .likelihood import TokenLikelihood, likelihoods, scored_prompt
from .stats import FinishReason, Stats
from .stopping import Text

if TYPE_CHECKING:
    from ..program.tree_program import TreeProgram


@dataclass(frozen=True, slots=True)
class Step:
    """What one step added to the output."""

    tokens: list[int]
    accepted: int
    """Of `tokens`, the first ones: those the draft had guessed."""
    bonus: int | None
    """The target's own token at the end of `tokens`; None if an end token among the accepted ones came first."""
    tree: TokenTree | None
    """What was verified; None for the first token, which comes from the prompt's logits."""
    path: list[int]
    """Nodes of `tree` that are output now, the root first (it is the token before `tokens`)."""
    text: str = ""
    """What became certain of the text, with a tokenizer given: no half character, and no part of a stop string."""
    likelihoods: Sequence[TokenLikelihood] = ()
    """Of each of `tokens`, where asked for."""
    prompt_likelihoods: Sequence[TokenLikelihood | None] = ()
    """With the first token, where asked for: of each token of the prompt but the first (None)."""
    request: int = 0
    """Whose it is, where `stream` was given several prompts."""


@dataclass(frozen=True, slots=True)
class Ending:
    """When to stop."""

    max_new_tokens: int
    eos: frozenset[int]
    stop: frozenset[int]


class Generation:
    """A prompt and what follows it, on a slot of the target's cache, with any number of drafts.

    Between two steps, and in the middle of one, it can be suspended: it gives its slots back, and computes again what
    lay in them when it is resumed. What it gives is the same as without.
    """

    def __init__(
        self,
        program: TreeProgram,
        prompt: Sequence[int],
        ending: Ending,
        drafts: Sequence[Draft],
        policy: TreePolicy,
        judge: Judge,
        stats: Stats,
        drawing: Drawing | None = None,
        *,
        slots: Slots = KEPT,
        text: Text | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        self.program, self.policy, self.judge, self.stats = program, policy, judge, stats
        self.prompt, self.drafts, self._slots, self._text = prompt, drafts, slots, text
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self.tokens = [*prompt]
        """The prompt and everything after it, the root last."""
        self._mark: Mark | None = None  # where the chance was when the step under way began
        self._chance = drawing.chance if drawing is not None else None
        self._policies: Sequence[TreePolicy | None] | None = None  # of the step under way
        self.budget: int | None = None
        """Nodes of a step at most, the root included; None: as many as the policy asks for."""
        judge.bind(program)
        self._streamed = program.stream_stats
        self.ends = ending.eos | ending.stop
        self.eos = ending.eos
        self.remaining = ending.max_new_tokens
        self.limit_reason: FinishReason = "length"
        limit = program.max_context
        if limit is not None and limit - len(prompt) < self.remaining:
            # Every token of the output can be run by the model, the last one included.
            self.remaining, self.limit_reason = limit - len(prompt), "context"
        max_tokens = len(prompt) + self.remaining
        max_nodes = policy.max_nodes * max(1, len(drafts)) if drafts else 1
        self.max_depth = policy.max_depth if drafts else 0
        self.capacity, self.max_nodes = max_tokens + max_nodes, max_nodes
        self.near_tie = TOLERANCE.get(program.dtype) if drawing is None else None
        self.root = -1
        self.needs_q = judge.needs_q or policy.needs_q
        self.slot, self._suspended = slots.take(program, self.capacity), False
        self.capacity = min(self.capacity, self.slot.cache.max_tokens)
        self.sessions: list[DraftSession] = self._open(max_tokens, max_nodes, drawing)
        self.learners = [session for session in self.sessions if isinstance(session, Learner)]
        self.readers = [session for session in self.sessions if isinstance(session, HiddenReader)]
        names = dict.fromkeys(name for reader in self.readers for name in reader.reads)
        self._outputs = (LOGITS, *names) if names else None
        self.controller = self._control()
        if self.remaining <= 0:
            stats.finish_reason = self.limit_reason

    def _open(self, max_tokens: int, max_nodes: int, drawing: Drawing | None) -> list[DraftSession]:
        if not self.drafts:
            return []
        request = DraftRequest(
            self.program.vocab_size,
            max_tokens,
            max_nodes,
            self.needs_q,
            prompt=self.prompt,
            target=self.program,
            cache=self.slot.cache,
            slot=self.slot.index,
            slots=self._slots,
        )
        if drawing is not None:
            request = replace(
                request,
                sampling=drawing.sampling,
                sampler=drawing.sampler,
                chance=drawing.chance,
                remember=not drawing.seeded,
            )
        compiled = sum(draft.compile_seconds for draft in self.drafts)
        sessions = [draft.open(request) for draft in self.drafts]
        self.stats.compile_seconds += sum(draft.compile_seconds for draft in self.drafts) - compiled
        return sessions

    def _control(self) -> Control | None:
        """Who chooses the trees, where the policy leaves that to measurement."""
        control = getattr(self.policy, "control", None)
        if control is None or not self.drafts:
            return None
        began = perf_counter()
        controller: Control = control(self.program, self.drafts)  # may measure and so compile
        self.stats.compile_seconds += perf_counter() - began
        return controller

    def advance(self) -> Working[Step]:
        """The next step: the prompt, which gives the first token, and then a tree each time."""
        if self._chance is not None and self._slots is not KEPT:  # else nobody suspends it
            self._mark = self._chance.mark()
        return self._prefill() if self.root < 0 else self._step()

    @property
    def missing(self) -> int:
        """Tokens to be run before a tree can be: the prompt, or all there are where the slots were given back."""
        return len(self.tokens) - (self.root >= 0) - self.slot.length

    @property
    def step_nodes(self) -> int:
        """Nodes of the next step's tree at most, the root included; a prompt is followed by none."""
        if self.root < 0:
            return 1
        return self.max_nodes if self.budget is None else max(1, min(self.budget, self.max_nodes))

    def room(self, nodes: int) -> Iterator[tuple[Slot | None, TreeProgram, int]]:
        """For how many tokens behind those in it each slot needs room in a step of so many nodes; None: a new slot."""
        yield self.slot, self.program, self.missing + nodes
        for session in self.sessions:
            room = getattr(session, "room", None)
            if room is not None:
                yield room(nodes)

    @property
    def behind(self) -> list[int]:
        """Tokens that each draft must run before the next tree, the root included."""
        rooms = [getattr(session, "room", None) for session in self.sessions]
        return [0 if room is None else room(0)[2] for room in rooms]

    def suspend(self) -> None:
        """Give back what is held in caches, in the middle of a step too, which then begins again after `resume`.

        Drafts without `suspend` and `resume` keep what they hold.
        """
        for session in self.sessions:
            if isinstance(session, Suspends):
                session.suspend()
        self._slots.give_back(self.slot)
        self._suspended = True
        if self._mark is not None and self._chance is not None:
            self._chance.back_to(self._mark)

    def resume(self) -> None:
        self.slot, self._suspended = self._slots.take(self.program, self.capacity), False
        for session in self.sessions:
            if isinstance(session, Suspends):
                session.resume(self.slot, self.tokens)

    def _catch_up(self, tokens: Sequence[int]) -> Working[Tensor]:
        """Commit these tokens, of which other slots may have some; logits [V] after the last one, which is run."""
        if self.root < 0 and self._outputs is not None:  # hidden states of all of them are wanted
            answer = yield Prompt(self.slot, tokens, self._outputs)
            for reader in self.readers:
                reader.read(answer)
            return answer[LOGITS]
        found = self._slots.adopt(self.slot, tokens)
        if self.root < 0:
            self.stats.cached_tokens = found
        return (yield Prompt(self.slot, tokens[found:]))

    def _prefill(self) -> Working[Step]:
        began, compiled = perf_counter(), self.program.compile_seconds
        scored: Sequence[TokenLikelihood | None] = ()
        if self._prompt_logprobs is None:
            logits = yield from self._catch_up(self.prompt)
        else:
            logits, scored = yield from scored_prompt(self.slot, self.prompt, self._prompt_logprobs)
        self.judge.accept(self.prompt)
        token = self.root = self.judge.first(logits)
        compiled = self.program.compile_seconds - compiled
        self.stats.prefill_seconds += perf_counter() - began - compiled
        self.stats.compile_seconds += compiled
        self.judge.accept([token])
        for learner in self.learners:
            learner.learn(self.prompt[-1:], logits[None])
        self._tell([*self.prompt, token])
        tokens = [token]
        found: Sequence[TokenLikelihood] = ()
        if self._logprobs is not None:
            found = likelihoods(logits[None], tokens, self._logprobs)
        self._emit(tokens)
        self._note_streaming()
        self._mark = None
        return Step(tokens, 0, token, None, [], self._new_text(), found, scored)

    def _step(self) -> Working[Step]:
        stats, program = self.stats, self.program
        began, compiled = perf_counter(), program.compile_seconds
        if self.missing:
            yield from self._catch_up(self.tokens[:-1])
        proposal = yield from self._propose()
        drafted, not_draft = perf_counter(), self._draft_side_seconds
        tree = proposal.tree()
        logits = yield Nodes(self.slot, tree, 0, self._outputs)  # [N, V]
        hidden = logits
        if self._outputs is not None:
            logits = hidden[LOGITS]
        verdict = self.judge.verify(proposal, logits)
        path = verdict.path
        if self.near_tie is not None:
            near = verdict.near_tie
            stats.near_ties += near_tie(logits, path, self.near_tie) if near is None else near
        verified, compiled = perf_counter(), program.compile_seconds - compiled

        tokens = [proposal.tokens[node] for node in path]
        tokens.append(verdict.bonus)
        del tokens[0]  # the root was output by the step before
        accepted = len(tokens) - 1
        found: Sequence[TokenLikelihood] = ()
        if self._logprobs is not None:
            found = likelihoods(logits[path], tokens, self._logprobs)
        if self._emit(tokens):  # may drop the end of `tokens`
            bonus = verdict.bonus if len(tokens) > accepted else None
            accepted = min(accepted, len(tokens))
            path = path[: accepted + 1]
        else:
            bonus = self.root = verdict.bonus
            self.slot.commit(path)
            self.judge.accept(tokens)
            for learner in self.learners:
                learner.learn(proposal.tokens, logits)
            for reader in self.readers:
                reader.read({name: hidden[name][path] for name in reader.reads})
            self._tell(tokens)
            stats.commit_seconds += perf_counter() - verified
        if self.controller is not None:
            drafting, rest = drafted - began - not_draft, perf_counter() - verified
            self.controller.observe(proposal, path, len(tokens), verified - drafted - compiled, drafting, rest)
        stats.record(proposal, path)
        stats.step_tokens += len(tokens)
        stats.draft_seconds += drafted - began - not_draft
        stats.verify_seconds += verified - drafted - compiled
        stats.compile_seconds += compiled
        stats.step_seconds += perf_counter() - began - not_draft - compiled
        self._note_streaming()
        self._policies = self._mark = None
        return Step(tokens, accepted, bonus, tree, path, self._new_text(), found[: len(tokens)])

    def _note_streaming(self) -> None:
        now, before = self.program.stream_stats, self._streamed
        if now is not None and before is not None:
            self.stats.weight_wait_seconds += now.waited - before.waited
            self.stats.weight_read_bytes += now.bytes - before.bytes
        self._streamed = now

    def _propose(self) -> Working[Proposal]:
        self._draft_side_seconds = 0.0
        # The bonus token needs no node, so `remaining` tokens need one level less.
        depth = min(self.max_depth, self.remaining - 1)
        drafts = self.drafts
        if depth <= 0 or not drafts:
            return Proposal.root(self.root, q=self.needs_q)
        length = len(self.tokens) - 1  # of the slot
        policies = self._policies
        if policies is None:  # else the step was begun before
            policies = [self.policy] * len(drafts)
            if self.controller is not None:
                policies = self.controller.plan(length, self.remaining)
            self._policies = policies
        nodes = self.capacity - length if self.budget is None else min(self.budget, self.capacity - length)
        asked = [(i, policy) for i, policy in enumerate(policies) if policy is not None][: max(0, nodes - 1)]
        if not asked:
            return Proposal.root(self.root, q=self.needs_q)
        limits = Limits(depth, max(2, nodes // len(asked)))
        prefilled, compiled = self._spent_by_drafts()
        proposals = []
        for i, policy in asked:
            try:
                found = self.sessions[i].propose(policy, limits)
                proposals.append(found if isinstance(found, Proposal) else (yield from found))
            except StopIteration as error:
                raise DraftFailed(draft=drafts[i].name, method="propose") from error
            except RuntimeError as error:
                if not isinstance(error.__cause__, StopIteration):  # what Python makes of one that leaves a generator
                    raise
                raise DraftFailed(draft=drafts[i].name, method="propose") from error
        now_prefilled, now_compiled = self._spent_by_drafts()
        self.stats.draft_prefill_seconds += now_prefilled - prefilled
        self.stats.compile_seconds += now_compiled - compiled
        self._draft_side_seconds = now_prefilled - prefilled + now_compiled - compiled
        return Proposal.merge(proposals)

    def _spent_by_drafts(self) -> tuple[float, float]:
        """Seconds so far of running prompts and of compiling."""
        prefilled = compiled = 0.0
        for draft in self.drafts:
            prefilled += draft.prefill_seconds
            compiled += draft.compile_seconds
        return prefilled, compiled

    def _tell(self, tokens: Sequence[int]) -> None:
        """The drafts learn what was accepted."""
        for draft, session in zip(self.drafts, self.sessions, strict=True):
            try:
                session.accept(tokens)
            except StopIteration as error:
                raise DraftFailed(draft=draft.name, method="accept") from error

    def _emit(self, tokens: list[int]) -> bool:
        """Count new tokens; cut them in place where the output ends, and say whether it did."""
        stats = self.stats
        ended = False
        if len(tokens) >= self.remaining:
            del tokens[self.remaining :]
            stats.finish_reason, ended = self.limit_reason, True
        if not self.ends.isdisjoint(tokens):
            end = next(i for i, token in enumerate(tokens) if token in self.ends)
            del tokens[end + 1 :]
            stats.finish_reason, ended = ("eos" if tokens[end] in self.eos else "stop"), True
        if self._text is not None and (length := self._text.push(tokens)) is not None:
            del tokens[length:]
            stats.finish_reason, ended = "stop", True
        self.remaining -= len(tokens)
        stats.tokens += len(tokens)
        self.tokens += tokens
        return ended

    def _new_text(self) -> str:
        """What is certain of the text now and was not before."""
        if self._text is None:
            return ""
        return self._text.pull(last=self.stats.finish_reason is not None)

    def close(self) -> None:
        """Give the slots back."""
        for session in self.sessions:
            session.close()
        self.sessions, self.learners, self.readers = [], [], []
        if not self._suspended:
            self._slots.give_back(self.slot)
