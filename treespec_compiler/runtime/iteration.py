"""One step of an engine: who enters, who gives way, a call of each draft for a level, and one call of the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import torch

from ..logs import logger
from ..program.cache import TreeCache
from ..program.tree_program import TreeProgram
from ..speculation.policies.load import Load
from ..speculation.policies.share import Share
from ..speculation.policies.step_costs import Took
from ..speculation.slots import PagedSlots
from ..speculation.work import Nodes, Prompt, Work, WorkResult, perform
from .engine_stats import StepSeconds
from .generation import Generation, Step
from .request import Request, Status
from .scheduler import Job, Scheduler

log = logger(__name__)


class Iteration:
    """Runs the jobs of a scheduler, a step at a time. `over` is told of each job that ends, and how."""

    def __init__(
        self,
        program: TreeProgram,
        slots: PagedSlots,
        scheduler: Scheduler,
        prompt_tokens: int,
        over: Callable[[Job, Status], None],
        load: Load,
    ) -> None:
        self.program, self.slots, self.scheduler, self.prompt_tokens = program, slots, scheduler, prompt_tokens
        self._over, self._load = over, load
        load.prompt_tokens = prompt_tokens
        self._steps: list[tuple[Request, Step]] = []
        self.seconds = StepSeconds()

    def step(self, new: Iterable[Job]) -> list[tuple[Request, Step]]:
        """With jobs that were added since the last one; what it gave to whom."""
        self._steps = []
        self.scheduler.waiting += new
        self.drop_cancelled()
        began = perf_counter()
        self._plan()
        planned = perf_counter() - began
        self._admit()
        self._preempt()
        began = perf_counter()
        for job in list(self.scheduler.running):
            if job.working is None:
                self._begin(job)
        rows, prompts = self._run_drafts()
        drafted = perf_counter()
        requests, nodes, seconds = self._run_target()
        self.seconds.draft += drafted - began
        self.seconds.target += seconds
        if nodes:
            tokens, rest = sum(len(step.tokens) for _, step in self._steps), perf_counter() - drafted - seconds
            self._load.took(Took(requests, nodes, rows, prompts, tokens, seconds, drafted - began, planned + rest))
        self.drop_cancelled()
        return self._steps

    def _admit(self) -> None:
        cache = self.slots.cache(self.program)

        def pages(job: Job) -> int:
            needed = -(-(len(job.tokens) + self._nodes(job)) // cache.page_size)
            return needed - cache.shared_with(job.tokens)

        def free() -> int:
            others = sum(self._lacking(job).get(cache, 0) for job in self.scheduler.running)
            return cache.page_counts.free - others

        for job in self.scheduler.admit(pages, free):
            try:
                with torch.inference_mode(False):  # what is made outlives the step
                    if job.generation is None:
                        job.generation = job.make()
                        shared = isinstance(job.generation.controller, Share)
                        job.generation.budget = 1 if shared else job.generation.max_nodes
                    else:
                        job.generation.resume()
            except Exception as error:
                self.end(job, Status.FAILED, error)
                continue
            job.request.status = Status.RUNNING
            if job.generation.stats.finish_reason is not None:  # no room for a single token
                self.end(job, Status.FINISHED)
            else:
                self._begin(job)

    def _preempt(self) -> None:
        for job in self.scheduler.make_room(self._lacking, lambda cache: cache.page_counts.free):
            job.request.status = Status.WAITING

    def _lacking(self, job: Job) -> dict[TreeCache, int]:
        """Pages that the job must take in this step, by cache."""
        found: dict[TreeCache, int] = {}
        if job.generation is None:
            return found
        for slot, program, tokens in job.generation.room(self._nodes(job)):
            if slot is None and self._nodes(job) == 1:
                continue  # a draft that is not asked
            cache = self.slots.cache(program) if slot is None else slot.cache
            new = -(-tokens // cache.page_size) if slot is None else cache.lacking(slot.index, tokens)
            found[cache] = found.get(cache, 0) + new
        return found

    def _nodes(self, job: Job) -> int:
        """Of the job's next tree at most."""
        return job.generation.step_nodes if job.generation is not None else 1

    def _begin(self, job: Job) -> None:
        assert job.generation is not None
        job.working = job.generation.advance()
        self._resume(job)

    def _plan(self) -> None:
        """Trees for those that are about to draft, of one budget."""
        generations, shares = list[Generation](), list[Share]()
        for job in self.scheduler.running:
            generation = job.generation
            if generation is None or job.working is not None or not isinstance(generation.controller, Share):
                continue
            share = generation.controller
            share.context, share.given = generation.slot.length, generation.stats.tokens
            share.remaining, share.behind = generation.remaining, generation.behind
            generations.append(generation)
            shares.append(share)
        self._load.plan(shares)
        for generation, share in zip(generations, shares, strict=True):
            generation.budget = share.nodes

    def _run_drafts(self) -> tuple[list[int], int]:
        """Everything that is not the target's call: a round for each level of the trees. Prompts of drafts run in
        pieces as the target's do; whose is not ready sits the step out. Gives the new nodes of each round, and the
        tokens of prompts.
        """
        left: dict[int, int] = {}
        rows, prompts = list[int](), 0
        while True:
            batch: list[tuple[Job, Work]] = []
            for job in self.scheduler.running:
                if job.wanted is not None and not self._of_target(job):
                    key = id(job.wanted.slot.program)
                    self._take_piece(job, left, key, batch)
            if not batch:
                return rows, prompts
            rows.append(_nodes_of(batch))
            prompts += _prompts_of(batch)
            self._perform(batch)

    def _run_target(self) -> tuple[int, int, float]:
        """Trees, their nodes and the seconds of the call; no nodes where there were prompts, or nothing."""
        batch: list[tuple[Job, Work]] = []
        left: dict[int, int] = {}
        for job in sorted(self.scheduler.running, key=lambda job: job.seniority, reverse=True):
            if job.wanted is not None and self._of_target(job):
                self._take_piece(job, left, 0, batch)
        seconds = self._perform(batch)
        nodes, prompts = _nodes_of(batch), _prompts_of(batch)
        if prompts and not nodes:
            self._load.prompted(prompts, seconds)
        return len(batch), 0 if prompts else nodes, seconds

    def _take_piece(self, job: Job, left: dict[int, int], key: int, batch: list[tuple[Job, Work]]) -> None:
        room = left.setdefault(key, self.prompt_tokens)
        piece = job.piece(room)
        if piece is not None:
            batch.append((job, piece))
            if isinstance(piece, Prompt):
                left[key] = max(0, room - len(piece.tokens))

    def _of_target(self, job: Job) -> bool:
        assert job.generation is not None and job.wanted is not None
        return job.wanted.slot is job.generation.slot

    def _perform(self, batch: Sequence[tuple[Job, Work]]) -> float:
        """Seconds until the first answer: those of the call, where there is one."""
        began, seconds = perf_counter(), 0.0
        for place, answer in perform([piece for _, piece in batch], mixed=True):
            seconds = seconds or perf_counter() - began
            job, piece = batch[place]
            if isinstance(piece, Prompt) and not isinstance(answer, Exception):
                assert isinstance(job.wanted, Prompt)
                job.done += len(piece.tokens)
                if job.done < len(job.wanted.tokens):
                    continue
                job.done = 0
            self._resume(job, answer)
        return seconds

    def _resume(self, job: Job, answer: WorkResult | Exception | None = None) -> None:
        working = job.working
        assert working is not None and job.generation is not None
        try:
            if answer is None:
                job.wanted = next(working)
            elif isinstance(answer, Exception):
                job.wanted = working.throw(answer)
            else:
                job.wanted = working.send(answer)
        except StopIteration as end:
            job.working = job.wanted = None
            step: Step = end.value
            job.request._add(step)
            self._steps.append((job.request, step))
            if job.generation.stats.finish_reason is not None:
                self.end(job, Status.FINISHED)
        except Exception as error:
            self.end(job, Status.FAILED, error)

    def drop_cancelled(self) -> None:
        """Those that run or wait."""
        for job in [*self.scheduler.running, *self.scheduler.waiting]:
            if job.cancelled:
                self.end(job, Status.CANCELLED)

    def end(self, job: Job, status: Status, error: Exception | None = None) -> None:
        """The job is over: what it held is free, and its user knows."""
        if job.working is not None:
            job.working.close()
        if job.generation is not None:
            try:
                job.generation.close()
            except Exception as another:
                log.warning("closing a request failed: %s", another)
        self.scheduler.remove(job)
        self._over(job, status)
        job.request._end(status, error)


def _nodes_of(batch: Sequence[tuple[Job, Work]]) -> int:
    """New nodes that a call runs, tokens of prompts left out."""
    return sum(len(work.tree) - work.start for _, work in batch if isinstance(work, Nodes))


def _prompts_of(batch: Sequence[tuple[Job, Work]]) -> int:
    """Tokens of prompts."""
    return sum(len(work.tokens) for _, work in batch if isinstance(work, Prompt))
