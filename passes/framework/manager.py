"""The pass manager: runs passes in order, checks after each, keeps the history and lets instruments watch."""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from treespec_compiler.errors import PassError, TreespecError
from treespec_compiler.logs import logger
from treespec_compiler.options import Options

from .state import GraphState

log = logger(__name__)

Check = Callable[[GraphState, str], None]
Wanted = Callable[[GraphState, Options], bool]


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline: `run` changes the graph (or only proves) and returns how many places it matched.

    `before` and `after` say what holds of the input and of the output. A pass with `changes=False` is held to it. A
    pass that is not `optional` is part of the proof: only `treespec opt` runs without it.

    `needs` names the passes whose results it reads: it stands behind them. `place_after` and `place_before` name passes
    that it stands behind or in front of wherever a pipeline names it. `standard` says whether the word `default` stands
    for it; `wanted` decides that by what was captured and the options, once those are known.
    """

    name: str
    run: Callable[[GraphState], int]
    before: str
    after: str
    level: str | None = None  # the level the graph has afterwards; None: unchanged
    optional: bool = False
    changes: bool = True
    place_after: tuple[str, ...] = ()
    place_before: tuple[str, ...] = ()
    user: bool = False
    needs: tuple[str, ...] = ()
    standard: bool = True
    wanted: Wanted | None = None

    def is_wanted(self, state: GraphState, options: Options) -> bool:
        """Whether the default pipeline of this model holds the pass."""
        return self.standard if self.wanted is None else self.wanted(state, options)

    @property
    def source_hash(self) -> str:
        """Hash of the module that defines the pass: its identity."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:12]

    @property
    def source(self) -> str:
        """Text of the module that defines the pass; its qualified name where there is no source (a REPL)."""
        run = inspect.unwrap(self.run)
        try:
            return inspect.getsource(sys.modules[run.__module__])
        except (OSError, TypeError, KeyError):
            return f"{run.__module__}.{run.__qualname__}"

    @property
    def slug(self) -> str:
        """The name as it is typed on a command line."""
        return slug(self.name)


def slug(name: str) -> str:
    return name.strip().replace(" ", "-").replace("_", "-")


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: counts, seconds, and whether the graph is another one afterwards."""

    name: str
    source_hash: str
    seconds: float
    matches: int
    nodes_before: int
    nodes_after: int
    changed: bool


@dataclass
class History:
    """Records of a pipeline run, in order."""

    records: list[PassRecord] = field(default_factory=list)

    def __getitem__(self, name: str) -> PassRecord:
        return next(r for r in self.records if slug(r.name) == slug(name))

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


class Instrument:
    """Watches a pipeline run without changing it; override what is of interest."""

    def before(self, state: GraphState, step: Pass) -> None:
        """`step` is about to run."""

    def after(self, state: GraphState, step: Pass, record: PassRecord) -> None:
        """`step` ran and its checks passed."""

    def failed(self, state: GraphState, step: Pass, error: Exception) -> None:
        """`step` or a check after it raised; the graph is as the failure left it."""


def run_passes(
    state: GraphState,
    passes: Sequence[Pass],
    checks: Sequence[Check] = (),
    user_checks: Sequence[Check] = (),
    instruments: Sequence[Instrument] = (),
) -> History:
    """Run `passes` in order; each check is called after each pass with (state, pass name) and raises on a broken graph.

    `user_checks` are called as well after a user's pass that changed the graph.
    """
    history = History()
    for step in passes:
        for instrument in instruments:
            instrument.before(state, step)
        try:
            record = _run(state, step, checks, user_checks)
        except Exception as error:
            log.info(
                "pass %s failed: %s", step.name, str(error).splitlines()[0] if str(error) else type(error).__name__
            )
            for instrument in instruments:
                instrument.failed(state, step, error)
            raise
        history.records.append(record)
        log.debug(
            "%s: %d matches, %d nodes, %.1f ms", step.name, record.matches, record.nodes_after, record.seconds * 1e3
        )
        for instrument in instruments:
            instrument.after(state, step, record)
    return history


def _run(state: GraphState, step: Pass, checks: Sequence[Check], user_checks: Sequence[Check]) -> PassRecord:
    print_before, nodes, started = fingerprint(state), len(state.graph.nodes), time.perf_counter()
    try:
        matches = step.run(state)
    except TreespecError:
        raise
    except Exception as error:
        raise PassError(
            pass_name=step.name,
            problem=f"{type(error).__name__}: {error}",
            expected="a pass that runs through, or a refusal",
            user=step.user,
        ) from error
    if step.changes:
        state.clean()
    if step.level is not None:
        state.level = step.level
    seconds = time.perf_counter() - started
    changed = fingerprint(state) != print_before
    if changed:
        state.rewritten()
    if changed and not step.changes:
        raise PassError(
            pass_name=step.name, problem="a changed graph", expected="the same graph (changes=False)", user=step.user
        )
    if not isinstance(matches, int):
        problem = f"{type(matches).__name__} returned"
        raise PassError(pass_name=step.name, problem=problem, expected="the number of matches", user=step.user)
    for check in (*checks, *user_checks) if step.user and changed else checks:
        try:
            check(state, step.name)
        except PassError as error:
            error.user = step.user
            raise
    return PassRecord(step.name, step.source_hash, seconds, matches, nodes, len(state.graph.nodes), changed)


def fingerprint(state: GraphState) -> int:
    """Equal for equal graphs: names, targets and arguments of every node."""
    return hash(tuple((n.name, n.op, str(n.target), str(n.args), str(n.kwargs)) for n in state.graph.nodes))
