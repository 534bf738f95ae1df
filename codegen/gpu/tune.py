"""Finds the fastest configuration of tree attention for a shape: compiled and pruned, checked, then timed.

Compiling needs no GPU; checking and timing are the caller's functions (`tune_device` has the real ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from treespec_compiler.errors import InvalidOption
from treespec_compiler.logs import logger

from ..tables import TuningEntry, TuningTable, identity, merge
from .attention_launches import launches_on_meta
from .offline import Offline
from .tree_attention_spec import AttentionKernel, Config, default_config, search_space
from .trial import TOLERANCE, Workload

log = logger(__name__)

OP = "tree_attention"
# A product in tensor cores, by target; on sm_90 those of 64 rows and more are the warp group's.
TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HMMA", "HGMMA"), "sm_100": ("HMMA", "UTCHMMA"), "gfx942": ("v_mfma",)}


SHAPES = tuple(
    Workload(nodes, requests, context)
    for requests, contexts in ((1, (1024, 8192, 32768)), (8, (2048,)))
    for context in contexts
    for nodes in (1, 8, 64)
)


@dataclass
class Pruned:
    """Configurations that compile well, best guess first, and why each other one does not."""

    kept: list[Config] = field(default_factory=list)
    rejected: dict[Config, str] = field(default_factory=dict)


def objection(spec: AttentionKernel, config: Config, target: str, made: Offline) -> str:
    """Why a compiled configuration is not worth running; empty: it is."""
    used = made.resources
    if used.spills:
        return f"spills ({used.stack} bytes of stack)"
    if used.shared > used.shared_limit:
        return f"shared memory ({used.shared} bytes of {used.shared_limit})"
    if torch.float32 not in (spec.dtype, spec.pool_dtype):
        names = ("HGMMA",) if target == "sm_90" and config.block_m >= 64 else TENSOR_CORES[target]
        if not any(made.has(name) for name in names):
            return f"no {' or '.join(names)}"
    return ""


def compile_config(spec: AttentionKernel, config: Config, target: str) -> Offline:
    """The kernel that shares keys out, which needs the most registers."""
    return launches_on_meta(spec, config)[0].compile(target)


def candidates(spec: AttentionKernel, rows: int, target: str, limit: int | None = None) -> list[Config]:
    """The search space for `rows` rows of a request, the default and what is like it first; at most `limit`."""
    default = default_config(spec, rows, target)
    fitting = [c for c in search_space(spec) if c.block_m <= max(16, 2 * default.block_m)]
    ordered = sorted({default, *fitting}, key=lambda c: (_unlike(c, default), sorted(c.as_dict().items())))
    return ordered[:limit]


def _unlike(a: Config, b: Config) -> float:
    """How many factors of two apart."""
    there = b.as_dict()
    return sum(abs(value - there[n]) if n == "num_stages" else abs(value.bit_length() - there[n].bit_length())
               for n, value in a.as_dict().items())  # fmt: skip


def prune(
    spec: AttentionKernel,
    configs: Iterable[Config],
    target: str,
    compiler: Callable[[AttentionKernel, Config, str], Offline] = compile_config,
    on_config: Callable[[Config, str], None] = lambda config, why: None,
) -> Pruned:
    """Compile each for the target; a compiler's error is a reason, not an error."""
    found = Pruned()
    for config in configs:
        try:
            why = objection(spec, config, target, compiler(spec, config, target))
        except Exception as error:
            log.debug("%s does not compile", config, exc_info=True)
            why = f"does not compile ({type(error).__name__})"
        if why:
            found.rejected[config] = why
        else:
            found.kept.append(config)
        on_config(config, why)
    return found


@dataclass
class Tuner:
    """One kernel on one device. `check` gives a configuration's error, `measure` its microseconds a call."""

    spec: AttentionKernel
    target: str
    check: Callable[[Config, Workload], float]
    measure: Callable[[Config, Workload], float]
    compiler: Callable[[AttentionKernel, Config, str], Offline] = compile_config
    limit: int | None = None
    """Configurations a shape, of those nearest to the default."""
    say: Callable[[str], None] = lambda text: None
    _pruned: Pruned = field(default_factory=Pruned)

    @property
    def rejected(self) -> Mapping[Config, str]:
        """Configurations that were compiled and not run, and why."""
        return self._pruned.rejected

    def entry(self, shape: Workload) -> TuningEntry:
        """The fastest configuration that is right, and the second; raises InvalidOption where none is."""
        found = self.find(shape)
        if isinstance(found, str):
            raise InvalidOption(
                name="shape", got=str(shape), expected="one that a configuration is right for", fix=f"Got {found}."
            )
        return found

    def find(self, shape: Workload) -> TuningEntry | str:
        """As `entry`; why there is none where no configuration is right."""
        best: list[tuple[float, Config]] = []
        wrong: dict[Config, str] = {}
        configs = self._compiled(candidates(self.spec, shape.nodes * self.spec.group, self.target, self.limit))
        for i, config in enumerate(configs, 1):
            self.say(f"{shape}: timing {i} of {len(configs)}")
            try:
                error = self.check(config, shape)
                # NOTE written so that NaN is wrong too
                if not error <= TOLERANCE[self.spec.dtype]:
                    wrong[config] = f"an error of {error:.1e}"
                    continue
                best.append((self.measure(config, shape), config))
            except Exception as error:  # such as too little shared memory on a smaller chip of the architecture
                log.debug("%s does not run for %s", config, shape, exc_info=True)
                wrong[config] = f"{type(error).__name__}: {error}".splitlines()[0]
        for config, why in wrong.items():
            log.warning("%s is left out for %s: %s", config, shape, why)
        if not best:
            return _some([*wrong.values(), *self._pruned.rejected.values()])
        best.sort(key=lambda found: found[0])
        (us, config), *rest = best
        runner_up = {"config": rest[0][1].as_dict(), "us": round(rest[0][0], 3)} if rest else None
        key = self.spec.tuning_key(shape.nodes, shape.requests, shape.capacity)
        return TuningEntry(key, config.as_dict(), us, runner_up)

    def _compiled(self, configs: Sequence[Config]) -> list[Config]:
        known = {*self._pruned.kept, *self._pruned.rejected}
        new = [config for config in configs if config not in known]
        for i, config in enumerate(new, 1):
            self.say(f"compiling {i} of {len(new)}")
            found = prune(self.spec, [config], self.target, self.compiler)
            self._pruned.kept += found.kept
            self._pruned.rejected |= found.rejected
        kept = set(self._pruned.kept)
        return [config for config in configs if config in kept]


def _some(reasons: Sequence[str], most: int = 4) -> str:
    """The first few different ones."""
    different = list(dict.fromkeys(reasons))
    more = [f"{len(different) - most} more"] if len(different) > most else []
    return "; ".join([*different[:most], *more]) or "no configurations"


@dataclass(frozen=True)
class Outcome:
    """What became of a kernel's shape: an entry, or why there is none; neither where it was measured before."""

    spec: AttentionKernel
    shape: Workload
    entry: TuningEntry | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """`64x1x2048 of 32/8/128`: heads, key heads and dimension, with VALUE_DIM and a window where there are any."""
        spec = self.spec
        value = f"+{spec.value_dim}" if spec.value_dim != spec.key_dim else ""
        window = f"w{spec.mask.window}" if spec.mask.window else ""
        return f"{self.shape} of {spec.heads}/{spec.kv_heads}/{spec.key_dim}{value}{window}"


def tune(
    tuner: Tuner,
    shapes: Sequence[Workload],
    table: TuningTable,
    save: Callable[[TuningTable], None],
    again: bool = False,
    on_shape: Callable[[Outcome], None] = lambda outcome: None,
) -> TuningTable:
    """Add an entry for each shape; saved after each, so that a run that was stopped goes on where it was.

    Shapes that the table has (of the same kernel source) are left alone unless `again`. A shape that no configuration
    is right for is left out with a warning, and tried again by the next run.
    """
    for shape in shapes:
        key = tuner.spec.tuning_key(shape.nodes, shape.requests, shape.capacity)
        if not again and any(identity(e.key) == identity(key) for e in table.entries):
            on_shape(Outcome(tuner.spec, shape))
            continue
        found = tuner.find(shape)
        if isinstance(found, str):
            outcome = Outcome(tuner.spec, shape, why=found)
            log.warning("%s is left out: %s", outcome.name, found)
        else:
            outcome = Outcome(tuner.spec, shape, found)
            table = merge(table, [found])
            save(table)
        on_shape(outcome)
    return table
