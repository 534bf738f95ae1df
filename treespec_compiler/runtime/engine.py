"""The loop of one request: propose, verify, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ..speculation.drafts import caches
from ..speculation.drafts.protocol import Draft, DraftRequest, DraftSession
from ..speculation.policies.protocol import Limits, TreePolicy
from ..speculation.proposal import Proposal
from ..speculation.sampling.chance import Chance
from ..speculation.sampling.samplers import ChildSampler
from ..speculation.sampling.settings import Sampling
from ..speculation.verifiers.judge import Judge
from ..speculation.verifiers.near_ties import TOLERANCE, near_tie
from ..tree import TokenTree
from .stats import FinishReason, Stats

if TYPE_CHECKING:
    from ..program.tree_program import TreeProgram
    from ..speculation.policies.auto import Controller


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


@dataclass(frozen=True, slots=True)
class Ending:
    """When to stop."""

    max_new_tokens: int
    eos: frozenset[int]
    stop: frozenset[int]


@dataclass(frozen=True, slots=True)
class Drawing:
    """What sampling needs beside the judge; greedy decoding has none."""

    sampling: Sampling
    sampler: ChildSampler
    chance: Chance


class Engine:
    """One request on one slot of the target's cache, with any number of drafts."""

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
    ) -> None:
        self.program, self.policy, self.judge, self.stats = program, policy, judge, stats
        self.prompt, self.drafts = prompt, drafts
        judge.bind(program)
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
        self.capacity = max_tokens + max_nodes
        self.near_tie = TOLERANCE.get(program.dtype) if drawing is None else None
        self.root = -1
        self.length = 0  # tokens in the target's cache
        needs_q = judge.needs_q or policy.needs_q
        request = DraftRequest(program.vocab_size, max_tokens, max_nodes, needs_q)
        if drawing is not None:
            request = replace(request, sampling=drawing.sampling, sampler=drawing.sampler, chance=drawing.chance)
        self.needs_q = needs_q
        self.cache = caches.take(program, self.capacity)
        request = replace(request, prompt=prompt, target=program, cache=self.cache)
        compiled = sum(draft.compile_seconds for draft in drafts)
        self.sessions: list[DraftSession] = [draft.open(request) for draft in drafts]
        stats.compile_seconds += sum(draft.compile_seconds for draft in drafts) - compiled
        self.controller = self._control()
        if self.remaining <= 0:
            stats.finish_reason = self.limit_reason

    def _control(self) -> Controller | None:
        """Who chooses the trees, where the policy leaves that to measurement."""
        control = getattr(self.policy, "control", None)
        if control is None or not self.drafts:
            return None
        began = perf_counter()
        controller: Controller = control(self.program, self.drafts)  # may measure and so compile
        self.stats.compile_seconds += perf_counter() - began
        return controller

    def prefill(self) -> Step:
        """Run the prompt; its logits give the first token."""
        with torch.inference_mode():
            began, compiled = perf_counter(), self.program.compile_seconds
            prompt = torch.tensor(self.prompt, dtype=torch.int64, device=self.program.device)
            logits = self.program.prefill(prompt, self.cache, slot=0)  # [V]
            self.judge.accept(self.prompt)
            token = self.judge.first(logits)
            compiled = self.program.compile_seconds - compiled
            self.stats.prefill_seconds += perf_counter() - began - compiled
            self.stats.compile_seconds += compiled
        self.length = len(self.prompt)
        self.root = token
        self.judge.accept([token])
        for session in self.sessions:
            session.accept([*self.prompt, token])
        self._emit([token])
        return Step([token], 0, token, None, [])

    def step(self) -> Step:
        with torch.inference_mode():
            return self._step()

    def _step(self) -> Step:
        stats, program = self.stats, self.program
        began, compiled = perf_counter(), program.compile_seconds
        proposal = self._propose()
        drafted, not_draft = perf_counter(), self._draft_side_seconds
        tree = proposal.tree()
        logits = program.verify(tree, self.cache)  # [N, V]
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
        if self._emit(tokens):  # may drop the end of `tokens`
            bonus = verdict.bonus if len(tokens) > accepted else None
            accepted = min(accepted, len(tokens))
            path = path[: accepted + 1]
            committed = verified
        else:
            bonus = verdict.bonus
            self.cache.commit(path)
            self.length += len(path)
            self.root = bonus
            self.judge.accept(tokens)
            for session in self.sessions:
                session.accept(tokens)
            committed = perf_counter()
            stats.commit_seconds += committed - verified
        if self.controller is not None:
            drafting, rest = drafted - began - not_draft, perf_counter() - verified
            self.controller.observe(proposal, path, len(tokens), verified - drafted - compiled, drafting, rest)
        stats.record(proposal, path)
        stats.step_tokens += len(tokens)
        stats.draft_seconds += drafted - began - not_draft
        stats.verify_seconds += verified - drafted - compiled
        stats.compile_seconds += compiled
        stats.step_seconds += perf_counter() - began - not_draft - compiled
        return Step(tokens, accepted, bonus, tree, path)

    def _propose(self) -> Proposal:
        self._draft_side_seconds = 0.0
        # The bonus token needs no node, so `remaining` tokens need one level less.
        depth = min(self.max_depth, self.remaining - 1)
        sessions = self.sessions
        if depth <= 0 or not sessions:
            return Proposal.root(self.root, q=self.needs_q)
        policies: Sequence[TreePolicy | None] = [self.policy] * len(sessions)
        if self.controller is not None:
            policies = self.controller.plan(self.length, self.remaining)
            if not any(policies):
                return Proposal.root(self.root, q=self.needs_q)
        asked = [(s, p) for s, p in zip(sessions, policies, strict=True) if p is not None]
        nodes = (self.capacity - self.length) // len(asked)
        limits = Limits(depth, nodes)
        prefilled = sum(draft.prefill_seconds for draft in self.drafts)
        compiled = sum(draft.compile_seconds for draft in self.drafts)
        proposal = Proposal.merge([session.propose(policy, limits) for session, policy in asked])
        prefilled = sum(draft.prefill_seconds for draft in self.drafts) - prefilled
        compiled = sum(draft.compile_seconds for draft in self.drafts) - compiled
        self.stats.draft_prefill_seconds += prefilled
        self.stats.compile_seconds += compiled
        self._draft_side_seconds = prefilled + compiled
        return proposal

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
        self.remaining -= len(tokens)
        stats.tokens += len(tokens)
        return ended

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self.sessions = []
        caches.give_back(self.program, self.cache)
