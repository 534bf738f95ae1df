"""`Engine`: many requests to one model at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..errors import EngineClosed, InvalidOption, RequestTooLarge
from ..ir.device import profile
from ..logs import logger
from ..offload.ring import StreamStats
from ..options import Options
from ..program.prompt import PromptLike
from ..program.tree_program import TreeProgram
from ..speculation.drafts.session import MAX_CHAIN
from ..speculation.policies.auto import Auto
from ..speculation.policies.load import Load, Loaded
from ..speculation.policies.named import as_policy
from ..speculation.policies.protocol import TreePolicy
from ..speculation.sampling.samplers import ChildSampler
from ..speculation.slots import PagedSlots
from .decoding import AnyVerifier
from .engine_ranks import EngineRanks
from .engine_stats import EngineCounts, EngineStats
from .generation import Generation, Step
from .iteration import Iteration
from .request import Request, Status
from .request_arguments import check_integer, split_stops
from .scheduler import Job, Scheduler
from .settings import Call, DraftLike, Model
from .starting import begin, drafts_of, program_of
from .stats import Stats
from .stopping import Text
from .together import mesh_of, said_of

log = logger(__name__)

PAGE_SIZE = 64
"""The CPU's attention takes 64 keys at a time: with as many in a page, it sums in the order it does without pages."""
TOKENS_A_REQUEST = 1024
"""Room made for each of `max_requests` where `max_tokens` is not given."""


class Engine:
    """Runs requests to one model together: at each step new ones enter and finished ones leave.

    Prompts run in pieces of `prompt_tokens` in all, in the same call of the model as the trees of requests that are
    further; drafts grow the trees of all requests level by level, a call for all. K/V lie in pages of `page_size`
    tokens, which requests that begin alike share; `max_tokens` are held at once, shared ones once. Where that is not
    enough, the request of least priority that came last waits, and is computed again later.

    `model`, `draft`, `policy`, `verifier`, `sampler`, `options` are those of `generate`. With a `tokenizer`, steps have
    text and requests may have stop strings. One thread at a time steps the engine: the caller's, or that of `start`.
    Raises what `tree_program` and the drafts raise.
    """

    def __init__(
        self,
        model: Model,
        *,
        draft: DraftLike = None,
        max_requests: int = 16,
        max_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        prompt_tokens: int | None = None,
        policy: TreePolicy | str | Sequence[int] | None = None,
        verifier: AnyVerifier | None = None,
        sampler: ChildSampler | str | None = None,
        options: Mapping[str, Any] | Options | None = None,
        tokenizer: Any = None,
        draft_tokenizer: Any = None,
    ) -> None:
        wanted: dict[str, Any] = {"max_requests": max_requests, "page_size": page_size}
        wanted |= {} if max_tokens is None else {"max_tokens": max_tokens}
        wanted |= {} if prompt_tokens is None else {"prompt_tokens": prompt_tokens}
        for name, value in wanted.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidOption(name=name, got=value, expected="a positive integer")
        shape = as_policy(policy)
        if isinstance(shape, Auto):
            # a request's own times are those of all others, too
            shape = Loaded(shape.nodes, shape.depth, shape.chain, shape.remember, clock=False, kind=shape.kind)
        self._shared: dict[str, Any] = {
            "draft": draft,
            "policy": shape,
            "verifier": verifier,
            "sampler": sampler,
            "options": options,
            "tokenizer": tokenizer,
            "draft_tokenizer": draft_tokenizer,
        }
        first = Call(model, [0], **self._shared)  # checks all of that
        self._model, self._tokenizer, self.policy = model, tokenizer, shape
        made = Stats()
        self._ranks = EngineRanks.of(mesh_of(first), said_of([first], {**wanted, "in an engine": True}))
        self.program: TreeProgram = program_of(first, made)
        if self._ranks is not None:
            self._ranks.agree(self.program)
        if isinstance(shape, Auto):
            self.policy = shape = shape.for_target(self.program)
        with self._leading():
            self._drafts = drafts_of(first, made, self.program) if self.leads else []
        self.compile_seconds = made.compile_seconds
        """Spent on making the programs now, where they were not there before."""
        self.max_requests = max_requests
        self.max_tokens = max_requests * TOKENS_A_REQUEST if max_tokens is None else max_tokens
        """Tokens held at once; also the most that one request may have."""
        nodes = shape.max_nodes * max(1, len(self._drafts)) if self._drafts else 1
        # beside the tokens: the last page of each request, which is not full, and the tree of one
        room = self.max_tokens + max_requests * page_size + nodes + MAX_CHAIN
        slots = PagedSlots(max_requests * max(1, len(self._drafts)), room, page_size)
        if self.leads:
            with self._leading():
                slots.cache(self.program)
        self._slots, self._scheduler = slots, Scheduler(slots, max_requests)
        chunk = self.program.options.prefill_chunk or profile(self.program.device).prompt_chunk
        self.prompt_tokens = chunk if prompt_tokens is None else prompt_tokens
        load = shape.load if isinstance(shape, Loaded) else Load()
        self._iteration = Iteration(self.program, slots, self._scheduler, self.prompt_tokens, self._over, load)
        self._new: list[Job] = []  # added, and not seen by a step yet
        self._jobs: dict[Request, Job] = {}
        self._counts, self._streamed = EngineCounts(), self.program.stream_stats
        self._requests = self._steps = 0
        self._lock = threading.Lock()  # of whoever steps
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        if self._ranks is not None:
            self._ranks.beat(self._lock, self._fail)

    # -- ranks -------------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether requests are added here: always, but for the ranks of a mesh that are not rank 0."""
        return self._ranks is None or self._ranks.rank == 0

    @property
    def failure(self) -> Exception | None:
        """What ended the engine of a mesh by itself: a rank that was lost, say."""
        return None if self._ranks is None else self._ranks.error

    def follow(self) -> None:
        """On every rank of a mesh but rank 0: run what that leads, until it closes the engine.

        Raises `RankLost`, and what ended the engine on rank 0.
        """
        if self._ranks is None:
            raise InvalidOption(name="mesh", got="none", expected="one to follow in", fix="Give the engine a mesh.")
        self._ranks.follow(self.program)

    def _leading(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ranks is None else self._ranks.leading(self.program)

    # -- requests ----------------------------------------------------------------------------------------------------

    def add(
        self,
        input_ids: PromptLike,
        *,
        stop: int | str | Sequence[int | str] = (),
        priority: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        **settings: Any,
    ) -> Request:
        """A request that takes part from the next step on. May be called from any thread, also during a step.

        `settings` are those of `generate` that may differ from request to request: `max_new_tokens`, `temperature`,
        `top_p`, `seed` and so on. `stop`: ids, kept in the output, and strings, which end the text before them.
        Requests of higher `priority` come first. With `logprobs`, steps have the likelihoods of their tokens and of so
        many likeliest ones (0: of none); with `prompt_logprobs`, the output has those of the prompt's tokens, too,
        which are all computed for that. Raises InvalidOption, InvalidPrompt, and RequestTooLarge where it could never
        run.
        """
        ids, strings = split_stops(stop, self._tokenizer)
        settings["stop_ids"] = [*settings.get("stop_ids", ()), *ids]
        check_integer("priority", priority, "an integer", low=None)
        for name, top in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if top is not None:
                check_integer(name, top, "an integer of 0 or more, or None", low=0)
        call = Call(self._model, input_ids, **self._shared, **settings)
        return self.enter(call, stops=strings, priority=priority, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def enter(
        self,
        call: Call,
        *,
        stops: Sequence[str] = (),
        priority: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Request:
        """As `add`, for a call that was checked; what it says of model, drafts and trees is taken to be the engine's
        own."""
        if not self.leads:
            fix = "Call `engine.follow()` on the others."
            raise InvalidOption(name="mesh", got="a request here", expected="requests on rank 0 alone", fix=fix)
        if self._closed or self.failure is not None:
            raise EngineClosed(number=self._requests)
        call.check_fits(self.program)
        limit = self.program.max_context
        new = call.max_new_tokens if limit is None else min(call.max_new_tokens, limit - len(call.prompt))
        if len(call.prompt) + new > self.max_tokens:
            raise RequestTooLarge(prompt=len(call.prompt), new=new, capacity=self.max_tokens)
        stats = Stats(prompt_tokens=len(call.prompt))
        text = Text(self._tokenizer, stops) if self._tokenizer is not None else None

        def make() -> Generation:
            return begin(
                call,
                self.program,
                self._drafts,
                stats,
                slots=self._slots,
                text=text,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )

        with self._changed:
            request = Request(self, self._requests, call.prompt, stats, priority)
            job = self._jobs[request] = Job(request, call.prompt, priority, self._requests, make)
            self._requests += 1
            self._new.append(job)
            self._changed.notify_all()
        return request

    def add_samples(self, input_ids: PromptLike, n: int, *, seed: int | None = None, **settings: Any) -> list[Request]:
        """`n` requests of one prompt, which is computed once; sample i has the seed `seed + i`."""
        check_integer("n", n, "a positive integer", low=1)
        return [self.add(input_ids, seed=None if seed is None else seed + i, **settings) for i in range(n)]

    def cancel(self, request: Request) -> None:
        """As `request.cancel()`."""
        job = self._jobs.get(request)
        if job is None:
            return
        job.cancelled = True
        if self._lock.acquire(blocking=False):  # else whoever steps does it at the end of the step
            try:
                self._drop_cancelled()
            finally:
                self._lock.release()

    @property
    def stats(self) -> EngineStats:
        counts, now = replace(self._counts), list(self._jobs)
        for request in now:
            counts.add(request.stats)
        running, took = len(self._scheduler.running), self._iteration.seconds
        streamed, before = self.program.stream_stats or StreamStats(), self._streamed or StreamStats()
        return EngineStats(
            waiting=len(now) - running,
            running=running,
            pages=self._slots.cache(self.program).page_counts,
            steps=self._steps,
            requests=self._requests,
            finished=counts.ended[Status.FINISHED],
            cancelled=counts.ended[Status.CANCELLED],
            failed=counts.ended[Status.FAILED],
            preemptions=self._scheduler.preemptions,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            tokens=counts.tokens,
            accepted=counts.accepted,
            nodes=counts.nodes,
            draft_seconds=took.draft,
            target_seconds=took.target,
            weight_wait_seconds=streamed.waited - before.waited,
            weight_read_bytes=streamed.bytes - before.bytes,
        )

    # -- driving -----------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, Step]]:
        """One call of the model for all requests that run, and what it gave to whom. [] where nobody waits or runs.

        A request that fails ends alone, with its error in `request.error`; with a rank of a mesh, all end, and it is
        raised.
        """
        with self._lock, self._leading(), torch.inference_mode():
            with self._changed:
                new, self._new = self._new, []
            self._steps += bool(self._jobs)
            found = self._iteration.step(new)
            if self.failure is not None:
                self._fail_all(self.failure)
                raise self.failure
        with self._changed:
            self._changed.notify_all()
        return found

    def run(self) -> None:
        """Until no request is left."""
        while self._jobs:
            if self._driven:
                with self._changed:
                    self._changed.wait_for(lambda: not self._jobs or self._closed)
            else:
                self.step()

    def start(self) -> None:
        """Have a thread of the engine's own step it whenever there are requests, until `close`."""
        with self._changed:
            if self._closed:
                raise EngineClosed(number=self._requests)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="treespec engine", daemon=True)
                self._thread.start()

    def forget(self) -> None:
        """New requests find nothing of what former ones computed: their beginnings are run again, once."""
        with self._lock:
            self._slots.forget()

    def close(self) -> None:
        """Cancel all requests and let the caches go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            for job in list(self._jobs.values()):
                job.cancelled = True
            self._drop_cancelled()
            self._slots.clear()
            if self._ranks is not None:
                self._ranks.end()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def progress(self, request: Request) -> None:
        """Step, or wait for the thread that does, until the request may have a new step."""
        if not self._driven:
            self.step()
            return
        with self._changed:
            self._changed.wait_for(lambda: request._steps or request.done or self._closed)

    @property
    def _driven(self) -> bool:
        """Whether another thread steps the engine."""
        return self._thread is not None and self._thread is not threading.current_thread()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # nobody's own fault: no request can go on
                log.exception("the engine failed at a step")
                self._fail(error)
                if self.failure is not None:
                    return

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._fail_all(error)
        with self._changed:
            self._changed.notify_all()

    def _fail_all(self, error: Exception) -> None:
        """No request can go on; in a mesh no other one can come."""
        self._closed = self._closed or self.failure is not None
        with self._changed:
            new, self._new = self._new, []
        self._scheduler.waiting += new
        for job in list(self._jobs.values()):
            self._iteration.end(job, Status.FAILED, error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            new, self._new = self._new, []
        self._scheduler.waiting += new
        self._iteration.drop_cancelled()

    def _over(self, job: Job, status: Status) -> None:
        with self._changed:
            del self._jobs[job.request]
        self._counts.add(job.request.stats)
        self._counts.ended[status] += 1
