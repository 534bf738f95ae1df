"""Who runs: requests enter and leave at every step, and give way when pages run out.

Iteration-level scheduling is Orca's (Yu et al., OSDI '22); preemption by recomputation vLLM's (Kwon et al., SOSP '23).
Among requests that wait, and among those that run, the senior ones come first: by priority, which rises by one for
every `PATIENCE` steps waited, then by arrival. So nobody is overtaken for ever, and nobody is preempted for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..program.cache import TreeCache
from ..speculation.slots import PagedSlots
from ..speculation.work import Prompt, Work, Working
from .generation import Generation, Step
from .request import Request

PATIENCE = 64
"""Steps of waiting that count as much as a priority higher by one."""


@dataclass(eq=False, slots=True)
class Job:
    """A request within the engine."""

    request: Request
    prompt: Sequence[int]
    priority: int
    arrival: int
    make: Callable[[], Generation]
    """Takes slots and opens the drafts' sessions."""
    waited: int = 0
    """Steps in all, after preemption too."""
    generation: Generation | None = None
    """None until it is admitted for the first time."""
    working: Working[Step] | None = None
    """The step under way, if one was begun."""
    wanted: Work | None = None
    done: int = 0
    """Tokens of the wanted prompt that were run."""
    cancelled: bool = False

    @property
    def seniority(self) -> tuple[int, int]:
        return self.priority + self.waited // PATIENCE, -self.arrival

    @property
    def tokens(self) -> Sequence[int]:
        """All that must be in a cache before it goes on."""
        return self.prompt if self.generation is None else self.generation.tokens

    @property
    def in_prompt(self) -> bool:
        """Whether it has tokens to be run before there is a tree."""
        return self.generation is None or self.generation.missing > 0

    def piece(self, most: int) -> Work | None:
        """What of the wanted work can be run now, with at most so many tokens of a prompt; None: nothing."""
        work = self.wanted
        if not isinstance(work, Prompt) or work.outputs is not None:
            return work
        tokens = work.tokens[self.done : self.done + most]
        return Prompt(work.slot, tokens) if tokens else None


@dataclass
class Scheduler:
    """Jobs that wait and jobs that run."""

    slots: PagedSlots
    most: int
    """Jobs that may run at the same time."""
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    preemptions: int = 0

    def admit(self, pages: Callable[[Job], int], free: Callable[[], int]) -> Iterable[Job]:
        """Jobs to be begun now, the senior first; each counts as running once it is given out.

        `pages` says how many pages a job needs to begin, `free` how many there are. Where the most senior does not fit,
        it is waited for: pages that become free are not taken away by smaller ones.
        """
        for job in sorted(self.waiting, key=lambda job: job.seniority, reverse=True):
            if len(self.running) == self.most:
                break
            if any(self._computes_for(other, job) for other in self.running):
                continue
            if self.running and pages(job) > free():
                break
            self.waiting.remove(job)
            self.running.append(job)
            yield job
        for job in self.waiting:
            job.waited += 1

    def make_room(self, lacking: Callable[[Job], dict[TreeCache, int]], free: Callable[[TreeCache], int]) -> list[Job]:
        """Jobs that must give their pages back, so that all others find what they need in this step.

        `lacking` says how many pages a job must take of which cache. The least senior goes first; the last one stays.
        """
        ordered = sorted(self.running, key=lambda job: job.seniority, reverse=True)
        given_up: list[Job] = []
        while len(ordered) > 1:
            wanted: dict[TreeCache, int] = {}
            for job in ordered:
                for cache, pages in lacking(job).items():
                    wanted[cache] = wanted.get(cache, 0) + pages
            if all(pages <= free(cache) for cache, pages in wanted.items()):
                break
            job = ordered.pop()
            self.preempt(job)
            given_up.append(job)
        return given_up

    def preempt(self, job: Job) -> None:
        """Its slots are given back, what they held is computed again when it is admitted again."""
        assert job.generation is not None
        if job.working is not None:
            job.working.close()
        job.working, job.wanted, job.done = None, None, 0
        job.generation.suspend()
        self.running.remove(job)
        self.waiting.append(job)
        self.preemptions += 1

    def remove(self, job: Job) -> None:
        """It is over, wherever it is."""
        self.waiting = [other for other in self.waiting if other is not job]
        self.running = [other for other in self.running if other is not job]

    def _computes_for(self, running: Job, waiting: Job) -> bool:
        """Whether a running job is about to compute the beginning of a waiting one, which then shares its pages."""
        generation = running.generation
        if generation is None or not running.in_prompt:
            return False
        common = common_length(running.tokens, waiting.tokens)
        common = min(common, len(waiting.tokens) - 1, len(running.tokens) - 1)
        return common >= min(self.slots.page_size, len(waiting.tokens) - 1) and generation.slot.length < common


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
