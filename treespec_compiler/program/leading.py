"""How rank 0 leads: it decides everything, and tells the others what to run on their parts of weights and K/V.

Only integers travel: of a call, the new nodes' tokens, positions and places; of a commit, what moves where. So all
ranks run the same calls whatever their drafts, clocks and random numbers say, and hold the same verdict.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InvalidOption, RankLost
from ..ir.specs import AttentionSpec
from .cache import TreeCache
from .executor import Announce, Executor
from .ranks import Ranks

_numbers = itertools.count()
_gone: list[int] = []
"""Numbers of caches that rank 0 let go since it last spoke of caches."""


class LedCache(TreeCache):
    """A cache of rank 0, of whose changes the other ranks are told."""

    number: int
    tell: Callable[..., None]

    def _grow(self, tokens: int) -> None:
        self.tell("grow", self.number, tokens)
        super()._grow(tokens)

    def _copy_page(self, old: int, new: int) -> None:
        self.tell("page", self.number, old, new)
        super()._copy_page(old, new)


def ranks_are_led() -> InvalidOption:
    fix = "Close the engine or the stream that runs on them first."
    return InvalidOption(name="mesh", got="ranks that are led already", expected="idle ones", fix=fix)


class Leader:
    """Rank 0 of a mesh during one generation, or as long as an engine is open. Raises `InvalidOption` where another one
    leads the same ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        if ranks.led:
            raise ranks_are_led()
        self.ranks, self.calls = ranks, 0
        self.error: Exception | None = None
        """Why ranks may hold different K/V now: nothing can go on with them."""
        self.inside = False
        """Whether `leading` is open."""
        self._told_end = False
        ranks.led.append(self)

    def tell(self, kind: str, *values: object) -> None:
        """Raises `RankLost`, and what made the ranks come apart earlier."""
        if self.error is not None and kind != "failed":
            raise self.error
        try:
            self.ranks.tell((kind, *values))
        except RuntimeError as error:
            self._end()
            self.error = self._lost()
            raise self.error from error

    def _lost(self) -> RankLost:
        return RankLost(rank=self.ranks.rank, size=self.ranks.size, step=self.calls)

    def _end(self) -> None:
        self._told_end = True
        if self in self.ranks.led:
            self.ranks.led.remove(self)

    def cache(
        self,
        sites: Sequence[AttentionSpec],
        max_tokens: int,
        slots: int,
        device: torch.device,
        commit_kernel: Callable[[Sequence[Tensor], Tensor, Tensor], Any],
        page_size: int | None = None,
        pages: int | None = None,
    ) -> LedCache:
        """A cache on every rank; see `TreeCache`."""
        number = next(_numbers)

        def commit(storages: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
            made.tell("commit", number, src.tolist(), dst.tolist())
            commit_kernel(storages, src, dst)

        self.tell("cache", number, max_tokens, slots, page_size, pages, [*_gone])
        _gone.clear()
        made = LedCache(sites, max_tokens, slots, device, commit, page_size, pages)
        made.number, made.tell = number, self.tell
        weakref.finalize(made, _gone.append, number)
        return made

    @contextlib.contextmanager
    def announce(self, cache: TreeCache, shape: Sequence[int], numbers: array[int]) -> Iterator[None]:
        """Tell of a call, which runs inside. One that fails here alone has left the others in its middle."""
        assert isinstance(cache, LedCache)
        cache.tell = self.tell  # it may be one that was kept from an earlier generation
        self.calls += 1
        self.tell("run", cache.number, tuple(shape), numbers.tobytes())
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.error = error
            raise
        except RuntimeError as error:  # which a collective raises where another rank is gone
            self.error = self._lost()
            raise self.error from error
        except Exception as error:
            self.error = error
            raise

    def done(self, result: object) -> None:
        """The others return this as well."""
        if not self._told_end:
            self._end()
            self.tell("done", result)

    def failed(self, error: BaseException) -> None:
        """The others raise this as well. Raises `RankLost` where one of them is the reason."""
        if not self._told_end:
            self._end()
            told = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
            self.error = self.error or (told if isinstance(told, Exception) else RuntimeError(type(error).__name__))
            self.tell("failed", told)


def _travels(error: BaseException) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


class Leads(Protocol):
    """What is needed of a tree program."""

    leader: Leader | None

    @property
    def _executor(self) -> Executor: ...

    def unchecked_cache(
        self, max_tokens: int, slots: int, page_size: int | None = None, pages: int | None = None
    ) -> TreeCache: ...


@contextlib.contextmanager
def leading(program: Leads, leader: Leader) -> Iterator[None]:
    """Calls of the program are told to the other ranks; an exception is, too."""
    executor = program._executor
    before: Announce | None = executor.announce
    program.leader, executor.announce, leader.inside = leader, leader.announce, True
    try:
        yield
    except StopIteration:
        raise
    except BaseException as error:
        leader.failed(error)
        raise
    finally:
        program.leader, executor.announce, leader.inside = None, before, False


_CACHES: weakref.WeakKeyDictionary[Any, dict[int, TreeCache]] = weakref.WeakKeyDictionary()
"""Of each program, this rank's parts of the caches that rank 0 made."""


def follow(program: Leads, ranks: Ranks) -> Any:
    """Run what rank 0 tells until it is done; its result. Raises what rank 0 raised, or `RankLost`."""
    caches = _CACHES.setdefault(program, {})
    executor, calls = program._executor, 0
    while True:
        try:
            kind, *values = ranks.hear()
        except RuntimeError as error:
            raise RankLost(rank=ranks.rank, size=ranks.size, step=calls) from error
        if kind == "done":
            return values[0]
        if kind == "failed":
            raise values[0]
        if kind == "run":
            calls += 1
            _run(executor, caches, values, ranks, calls)
        else:
            _change(program, caches, kind, values)


def _run(executor: Executor, caches: dict[int, TreeCache], values: Sequence[Any], ranks: Ranks, calls: int) -> None:
    number, shape, numbers = values
    try:
        executor.run_laid_out(shape, numbers, caches[number])
    except RuntimeError as error:
        # Where another rank is gone, rank 0 knows it too, and ends or says so.
        try:
            heard = ranks.hear()
        except RuntimeError:
            raise RankLost(rank=ranks.rank, size=ranks.size, step=calls) from error
        if heard[0] == "failed":
            raise heard[1] from error
        raise


def _change(program: Leads, caches: dict[int, TreeCache], kind: str, values: Sequence[Any]) -> None:
    if kind == "still":  # nothing to do for now
        return
    number, *rest = values
    if kind == "cache":
        *sizes, gone = rest
        for old in gone:
            caches.pop(old, None)
        with torch.inference_mode(False):
            caches[number] = program.unchecked_cache(*sizes)
        return
    cache = caches[number]
    if kind == "grow":
        cache._grow(rest[0])
    elif kind == "page":
        cache._copy_page(*rest)
    else:
        moves = torch.tensor(rest).to(cache.storages[0].device)
        cache._commit(cache.storages, moves[0], moves[1])
