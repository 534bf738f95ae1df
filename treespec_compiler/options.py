"""Options of a tree program: one frozen, hashable record, parsed from what a user types."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, get_args

from .errors import InvalidOption, UnknownOption
from .mesh import Mesh
from .offload_options import Offload

Lowering = Literal["inductor", "eager"]
OnUnsupported = Literal["raise", "fallback"]
Verify = Literal["build", "off"]
VerifyEach = Literal["none", "spec", "semantic"]
Kernels = Literal["auto", "aten", "reference"]
WeightStorage = Literal["exact", "float32", "int8", "int4"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "lowering": get_args(Lowering),
    "on_unsupported": get_args(OnUnsupported),
    "verify": get_args(Verify),
    "verify_each": get_args(VerifyEach),
    "kernels": get_args(Kernels),
    "weights": get_args(WeightStorage),
}

LOWERING_VARIABLE = "TREESPEC_LOWERING"
PROGRAM_CACHE_VARIABLE = "TREESPEC_PROGRAM_CACHE"


# Inductor counts a call's numbers in 32 bits: the widest layers, of some 60,000 features, still fit.
MAX_CHUNK = 32768


@dataclass(frozen=True)
class Options:
    """What `tree_program(options=...)` and `torch.compile(..., options=...)` take."""

    lowering: Lowering = "inductor"
    """How the rewritten graph is run: compiled by Inductor, or op by op."""
    on_unsupported: OnUnsupported = "raise"
    """What `generate`/`stream` do with a model that cannot be converted."""
    verify: Verify = "build"
    """Whether a program is compared with the eager model before its first use, as it will run."""
    verify_each: VerifyEach = "spec"
    """What is checked after every pass: nothing, the level's rules, or the rules and the meaning on random trees."""
    max_context: int | None = None
    """Positions the program may use; None: as many as the model proves to have."""
    prefill_chunk: int | None = None
    """Prompt tokens that run in one call, at most 32768; None: 256 on a CPU, 2048 on a GPU."""
    kernels: Kernels = "auto"
    """Which implementations ops are bound to: the best registered, ATen only, or the readable references."""
    weights: WeightStorage = "exact"
    """How weights of products are stored on a CPU: in the narrowest form that holds their every value exactly, in
    float32, or rounded to eight or four bits; then the target is the rounded model."""
    pipeline: str | None = None
    """Passes to run, such as `default,mine,-fuse`; None: the default pipeline."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Whether steps are recorded as CUDA graphs: "auto" where they can be, True or an error, or never."""

    program_cache: bool | str | None = None
    """Whether programs are saved on disk and found again: in the user's cache directory (True), in this folder, never;
    None: as `TREESPEC_PROGRAM_CACHE` (0, 1 or a folder) says, by default True."""
    mesh: str | None = None
    """Ranks that the program runs on, such as "tp=2,pp=2": so many share every layer, in so many stages; None: one
    process runs it alone."""
    offload: Offload | None = None
    """Weights that do not stay in memory: "disk", or a mapping of `Offload`'s fields; None: all of them stay."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offload", Offload.parse(self.offload))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InvalidOption(name=name, got=value, expected=" or ".join(map(repr, choices)))
        if self.max_context is not None:
            _check_positive("max_context", self.max_context, "a positive integer or None")
        if self.prefill_chunk is not None:
            _check_positive("prefill_chunk", self.prefill_chunk, f"1 to {MAX_CHUNK} or None", MAX_CHUNK)
        Mesh.parse(self.mesh)
        if self.offload is not None and self.ranks > 1:
            fix = "Weights of one of several ranks are not streamed yet: leave one of the two out."
            raise InvalidOption(name="offload", got=f"mesh={self.mesh!r} beside it", expected="one rank", fix=fix)
        if self.rounded:
            _check_rounded(self)
        if not isinstance(self.cuda_graphs, bool) and self.cuda_graphs != "auto":
            raise InvalidOption(name="cuda_graphs", got=self.cuda_graphs, expected="'auto' or True or False")
        if not isinstance(self.program_cache, (bool, str, type(None))) or self.program_cache == "":
            raise InvalidOption(name="program_cache", got=self.program_cache, expected="True, False or a folder's path")

    @property
    def rounded(self) -> bool:
        """Whether the target is the model with its weights rounded."""
        return self.weights in ("int8", "int4")

    @property
    def shape(self) -> Mesh:
        """What `mesh` says."""
        return Mesh.parse(self.mesh)

    @property
    def ranks(self) -> int:
        """How many processes run a program together."""
        return self.shape.ranks

    @property
    def saved_where(self) -> bool | str:
        """`program_cache`, the environment asked where it is None; read anew each time."""
        if self.program_cache is not None:
            return self.program_cache
        where = os.environ.get(PROGRAM_CACHE_VARIABLE, "")
        return {"": True, "0": False, "1": True}.get(where, where)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None = None) -> Options:
        """Options from a mapping, from nothing, or as they are; `TREESPEC_LOWERING` overrides `lowering`."""
        if isinstance(options, Options):
            parsed = options
        elif options is None:
            parsed = cls()
        elif isinstance(options, Mapping):
            known = [field.name for field in fields(cls)]
            for name in options:
                if name not in known:
                    raise UnknownOption(name=name, known=known)
            parsed = cls(**options)
        else:
            raise InvalidOption(name="options", got=options, expected="a mapping, an Options or None")
        return parsed._with_lowering()

    def _with_lowering(self) -> Options:
        lowering = os.environ.get(LOWERING_VARIABLE)
        if not lowering:
            return self
        if lowering not in _CHOICES["lowering"]:
            expected = " or ".join(map(repr, _CHOICES["lowering"]))
            fix = f"Set or unset the environment variable {LOWERING_VARIABLE}."
            raise InvalidOption(name=LOWERING_VARIABLE, got=lowering, expected=expected, fix=fix)
        return replace(self, lowering=cast(Lowering, lowering))


def _check_rounded(options: Options) -> None:
    """What would run other weights than the rounded ones, or could not store them."""
    others = {
        "on_unsupported": (options.on_unsupported, "raise", "The model itself, which it falls back to, is not rounded"),
        "kernels": (options.kernels, "auto", "The CPU's own kernels store rounded weights"),
        "mesh": (options.mesh, None, "Weights that several ranks share are not rounded yet"),
    }
    for name, (got, expected, why) in others.items():
        if got != expected:
            fix = f"{why}: leave one of the two out."
            raise InvalidOption(
                name=name, got=f"{got!r} beside weights={options.weights!r}", expected=repr(expected), fix=fix
            )


def _check_positive(name: str, value: object, expected: str, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidOption(name=name, got=value, expected=expected)
