"""Every error treespec raises on purpose: a class each, a fixed text each.

A text says what was got, what was expected and what to do next. Classes are dataclasses: raise them with keyword
arguments (`raise CacheOverflow(slot=0, length=10, new=8, capacity=16)`); the fields stay readable on the exception.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from pathlib import PurePath
from typing import Any, ClassVar


class TreespecError(Exception):
    """Base of every error of this package."""

    template: ClassVar[str] = ""
    """Format string of the text; `{e.name}` reads a field or a property of the exception."""

    def __str__(self) -> str:
        return self.template.format(e=self) if self.template else super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        # NOTE: the default rebuilds from `args`, which keyword arguments never reach.
        if not is_dataclass(self):
            return super().__reduce__()  # type: ignore[return-value]
        return _rebuild, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})


def _rebuild(cls: type[TreespecError], values: dict[str, Any]) -> TreespecError:
    return cls(**values)


class Refusal(enum.StrEnum):
    """What kind of thing is in the way of a conversion. Decisions read the kind, never the words of a reason."""

    NO_GRAPH = "no-graph"  # the code cannot be traced as one graph
    CONTROL = "control-flow"  # what is computed is chosen at run time, by values
    RAISES = "raises"  # the model's own code raises for this number of tokens
    SPECIALISED = "specialised"  # the number of tokens is a constant of the trace
    BRANCH = "branch"  # other numbers of tokens are computed in another way
    LENGTH = "length"  # the number of tokens is used as a number
    POSITIONS = "positions"  # positions that do not count the tokens one by one
    MASK = "mask"  # a mask that is not causal, or whose predicate is not known
    CONTENT = "content"  # a mask that is computed from the content of the tokens
    ATTENTION = "attention"  # attention in a form that is not known
    NO_ATTENTION = "no-attention"  # there is nothing to keep a tree of
    MIXER = "mixer"  # information moves between tokens outside attention
    UNKNOWN_OP = "unknown-op"  # an op without a rule: it may mix tokens
    STATE = "state"  # forward changes or keeps something, or reads its own cache elsewhere
    ROUNDING = "rounding"  # numbers are rounded where the program would not, or not in the same way
    TRAINING = "training"  # dropout or random numbers
    SUBCLASS = "subclass"  # parameters that are not plain tensors
    CALL = "call"  # what the model takes or gives back is not token ids and logits
    EARLY_EXIT = "early-exit"  # the graph has no place to leave at
    MESH = "mesh"  # nothing can be cut for so many ranks
    RESIDUAL = "residual"  # no single value carries everything from one layer to the next


@dataclass(eq=False)
class Unsupported(TreespecError):
    """A refusal: the graph was not converted. Never raised after something was half converted."""

    kind: Refusal
    reason: str
    _: KW_ONLY
    node: str | None = None
    """The graph node that stopped the conversion, printed."""
    source: str | None = None
    """`file:line` (and the line's text) of the model's code that made the node."""
    layer: str | None = None
    """Path of the submodule, `model.layers.3.self_attn`."""
    module: str | None = None
    """Class of that submodule, or of the nearest one around it that is not one of torch's."""
    way_out: str | None = None
    verdict: str = "treespec cannot convert this model"

    DEFAULT_WAY_OUT: ClassVar[str] = (
        'run the model without speculation (`on_unsupported="fallback"`), or change the code at the line above'
    )

    def __str__(self) -> str:
        rows = [
            ("node", self.node),
            ("source", self.source),
            ("layer", self.place),
            ("reason", self.reason),
            ("way out", self.way_out or self.DEFAULT_WAY_OUT),
        ]
        lines = [f"  {name + ':':<8} {_indent(str(value))}" for name, value in rows if value]
        return "\n".join([f"{self.verdict}.", *lines])

    @property
    def place(self) -> str | None:
        """`model.layers.3.self_attn (LlamaAttention)`."""
        return f"{self.layer} ({self.module})" if self.layer and self.module else self.layer


def _indent(text: str) -> str:
    return "\n           ".join(text.strip().splitlines())


@dataclass(eq=False, kw_only=True)
class InvalidTree(TreespecError, ValueError):
    """A `TokenTree` that is not one."""

    got: str
    expected: str
    fix: str = "List parents before their children and use -1 for nodes that continue the committed prefix."
    template: ClassVar[str] = "Invalid token tree: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class InvalidForest(TreespecError, ValueError):
    """A `Forest` that is not one."""

    got: str
    expected: str
    fix: str = "Give `Forest([(slot, tree), ...])` one tree a slot; `TokenTree.merge` joins several trees of one slot."
    template: ClassVar[str] = "Invalid forest: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class InvalidPrompt(TreespecError, ValueError):
    """Prompt ids that cannot be run."""

    got: str
    expected: str
    fix: str = "Encode the text with the model's own tokenizer and pass at least one id."
    template: ClassVar[str] = "Invalid prompt: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class TokenOutOfRange(TreespecError, ValueError):
    """A token id the model has no embedding for."""

    token: int
    index: int
    vocab_size: int
    where: str = "the prompt"
    template: ClassVar[str] = (
        "Token id out of range: got {e.token} at index {e.index} of {e.where}, expected 0 to {e.last} "
        "(the model's vocabulary has {e.vocab_size} ids). Use the tokenizer that belongs to this model."
    )

    @property
    def last(self) -> int:
        return self.vocab_size - 1


@dataclass(eq=False, kw_only=True)
class CacheOverflow(TreespecError, ValueError):
    """More tokens than a slot of the cache has room for."""

    slot: int
    length: int
    new: int
    capacity: int
    template: ClassVar[str] = (
        "The cache is full: slot {e.slot} holds {e.length} tokens and got {e.new} more, expected at most "
        "{e.capacity} in all (uncommitted tree nodes included). "
        "Make a larger cache, `new_cache(max_tokens={e.needed})` or more, or free the slot."
    )

    @property
    def needed(self) -> int:
        return self.length + self.new


@dataclass(eq=False, kw_only=True)
class RequestTooLarge(TreespecError, ValueError):
    """A request that an engine could not run if it had all pages for itself."""

    prompt: int
    new: int
    capacity: int
    template: ClassVar[str] = (
        "The request can never run: got a prompt of {e.prompt} tokens and {e.new} new ones, expected at most "
        "{e.capacity} together, which is all that the engine holds. Ask for fewer new tokens, or make an engine with a "
        "larger `max_tokens`."
    )


@dataclass(eq=False, kw_only=True)
class EngineClosed(TreespecError, RuntimeError):
    """A request to an engine that was closed."""

    number: int
    template: ClassVar[str] = (
        "The engine is closed: got request {e.number}, expected none after `close()`. Make another engine."
    )


@dataclass(eq=False, kw_only=True)
class OutOfPages(TreespecError, RuntimeError):
    """More pages wanted of a paged cache than are free."""

    wanted: int
    free: int
    total: int
    page_size: int
    template: ClassVar[str] = (
        "The cache is out of pages: got {e.wanted} wanted, expected at most the {e.free} free ones of {e.total} (of "
        "{e.page_size} tokens each). Free a slot, or make a larger cache, `new_cache(pages=...)`."
    )


@dataclass(eq=False, kw_only=True)
class ContextOverflow(TreespecError, ValueError):
    """More tokens than the model itself has positions for."""

    position: int
    max_context: int
    why: str = "its position table ends there"
    template: ClassVar[str] = (
        "The model's context is full: got a token at position {e.position}, expected positions below "
        "{e.max_context} ({e.why}). Shorten the prompt or generate fewer tokens."
    )


@dataclass(eq=False, kw_only=True)
class StaleCache(TreespecError, RuntimeError):
    """A cache of a program that was rebuilt or of another program."""

    reason: str
    template: ClassVar[str] = (
        "This cache no longer fits the program: got a cache made before {e.reason}, expected one made after. "
        "Make a new one with `program.new_cache(...)` and prefill the prompt again."
    )


@dataclass(eq=False, kw_only=True)
class InvalidWeight(TreespecError, ValueError):
    """A weight that is not what a weight expression was made for, or an expression that cannot be made."""

    got: str
    expected: str
    fix: str = "Weights of one model belong together; a size that does not divide stays whole (replicate it)."
    template: ClassVar[str] = "Invalid weight: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class InvalidPath(TreespecError, ValueError):
    """A path given to `cache.commit` that does not run down the tree from a root."""

    got: str
    expected: str
    fix: str = "List local node indices root first, as `tree.path(node)` does; [] commits nothing."
    template: ClassVar[str] = "Invalid path: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class UnknownSlot(TreespecError, ValueError):
    """A slot the cache does not have."""

    slot: object
    slots: int
    template: ClassVar[str] = (
        "Unknown slot: got {e.slot!r}, expected an integer from 0 to {e.last} (the cache has {e.slots} slots). "
        "Make a cache with more slots, `new_cache(slots=...)`, or free one and use it again."
    )

    @property
    def last(self) -> int:
        return self.slots - 1


@dataclass(eq=False, kw_only=True)
class UnknownOption(TreespecError, ValueError):
    """An option name that does not exist."""

    name: str
    known: Sequence[str]
    template: ClassVar[str] = "Unknown option: got {e.name!r}, expected one of {e.names}. {e.hint}"

    @property
    def names(self) -> str:
        return ", ".join(sorted(self.known))

    @property
    def hint(self) -> str:
        near = difflib.get_close_matches(str(self.name), list(self.known), n=1, cutoff=0.5)
        return f"Did you mean {near[0]!r}?" if near else "Remove it."


@dataclass(eq=False, kw_only=True)
class InvalidOption(TreespecError, ValueError):
    """A known option (or argument) with a value it cannot take."""

    name: str
    got: object
    expected: str
    fix: str = ""
    template: ClassVar[str] = "Invalid option {e.name}: got {e.got!r}, expected {e.expected}. {e.next_step}"

    @property
    def next_step(self) -> str:
        return self.fix or f"Give {self.name} such a value or leave it out."


class WrongType(InvalidOption, TypeError):
    """A known argument with a value of a type it never takes."""


@dataclass(eq=False, kw_only=True)
class LossyPair(TreespecError, ValueError):
    """Parts of speculation that each work, but together change the distribution of the output."""

    pair: str
    reason: str
    instead: str
    template: ClassVar[str] = (
        "Not lossless: got {e.pair}, expected a pair that keeps the target's distribution. {e.reason} "
        "Use {e.instead}: lossless (docs/verification.md has the table)."
    )


@dataclass(eq=False, kw_only=True)
class InvalidLogits(TreespecError, ArithmeticError):
    """The target's logits leave no distribution to take a token from."""

    position: int
    problem: str = "NaN or infinite logits"
    template: ClassVar[str] = (
        "The target's logits are unusable: got {e.problem} after the token at position {e.position}, expected finite "
        "ones (-inf is legal for some of the ids). The request was ended; others are untouched. "
        "Check the model's weights and dtype."
    )


@dataclass(eq=False, kw_only=True)
class DraftFailed(TreespecError, RuntimeError):
    """A draft of the user's own that lets StopIteration out, which would look like the output's end."""

    draft: str
    method: str
    template: ClassVar[str] = (
        "The draft {e.draft!r} failed: got a StopIteration out of its `{e.method}`, expected a result. "
        "A `next` found nothing: give it a default, `next(items, None)`."
    )


@dataclass(eq=False, kw_only=True)
class ModelFailed(TreespecError, RuntimeError):
    """A model that could not be converted and, run in the plain loop, raises an error of its own."""

    tokens: int
    problem: str
    template: ClassVar[str] = (
        "The model itself failed on {e.tokens} tokens: got {e.problem}, expected logits. Its own code raised that, run "
        "without treespec: are all ids in its vocabulary, and is its context long enough?"
    )


@dataclass(eq=False, kw_only=True)
class TokenizerMismatch(TreespecError, ValueError):
    """Draft and target that do not mean the same thing by a token id."""

    difference: str
    template: ClassVar[str] = (
        "Draft and target use different tokenizers: got {e.difference}, expected the same token for every id "
        "both know. Use a draft that was trained with the target's tokenizer."
    )


@dataclass(eq=False, kw_only=True)
class UnreadableModel(TreespecError, ValueError):
    """A model name or folder that gives no model."""

    name: str
    problem: str
    expected: str = "a folder with config.json and *.safetensors"
    fix: str = "Check the path, or name the model as `hf:PATH_OR_ID`, `py:module:factory` or `demo`."
    template: ClassVar[str] = "Cannot read model {e.name!r}: got {e.problem}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class MissingPackage(TreespecError, ImportError):
    """A package that only some commands need."""

    package: str
    purpose: str
    fix: str
    template: ClassVar[str] = "{e.package} is not installed: got no such package, expected one for {e.purpose}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class MissingCompiler(TreespecError, RuntimeError):
    """No C++ compiler, which Inductor's code for a CPU needs."""

    looked_for: str
    template: ClassVar[str] = (
        "No C++ compiler: got none (looked for {e.looked_for}), expected one that Inductor can build code with. "
        'Install g++ or name one in CXX, or have the program run op by op: option lowering="eager", or the environment '
        "variable TREESPEC_LOWERING=eager."
    )


@dataclass(eq=False, kw_only=True)
class CorruptTable(TreespecError, ValueError):
    """A table of measurements that does not parse or has the wrong schema."""

    path: str
    problem: str
    expected: str = "a JSON object with schema, meta and entries"
    template: ClassVar[str] = "Corrupt {e.kind} {e.path}: got {e.problem}, expected {e.expected}. {e.next_step}"

    @property
    def latency(self) -> bool:
        """Whether it is one of forward passes, by the folder it lies in; else it is one of kernels."""
        return PurePath(self.path).parent.name == "latency"

    @property
    def kind(self) -> str:
        return "latency table" if self.latency else "tuning table"

    @property
    def next_step(self) -> str:
        if self.latency:
            return "It is made anew when it is needed; `treespec tune --latency --target MODEL` makes a thorough one."
        return "Delete the file; `treespec tune MODEL --device cuda` makes it again."


@dataclass(eq=False, kw_only=True)
class CaptureFailed(TreespecError, RuntimeError):
    """A step that cannot be recorded as a CUDA graph."""

    problem: str
    template: ClassVar[str] = (
        "A step cannot be recorded as a CUDA graph: got {e.problem}, expected kernels that never wait for the device. "
        'Use the option cuda_graphs="auto", which runs such a program kernel by kernel, or False.'
    )


@dataclass(eq=False, kw_only=True)
class WrongKernel(TreespecError, RuntimeError):
    """A generated kernel that gives wrong numbers on this device: Triton compiled it wrongly."""

    kernel: str
    error: float
    tolerance: float
    versions: str
    template: ClassVar[str] = (
        "A generated kernel is wrong on this device: got an error of {e.error:.1e} against the reference for "
        "{e.kernel}, expected at most {e.tolerance:.1e}. Nothing was computed with it. Please report it with "
        '{e.versions}; until then, use the option kernels="aten", or another version of Triton.'
    )


@dataclass(eq=False, kw_only=True)
class PassError(TreespecError, RuntimeError):
    """A pass broke its promise: the graph after it does not satisfy the level's rules. A bug in the pass."""

    pass_name: str
    problem: str
    expected: str = "a graph that satisfies the rules of its level"
    user: bool = False
    """Whether the pass is the user's own."""
    template: ClassVar[str] = (
        "Pass {e.pass_name!r} left a wrong graph: got {e.problem}, expected {e.expected}. {e.whose}"
    )

    @property
    def whose(self) -> str:
        if self.user:
            return f"Nothing was converted: mend the pass, or take it out of the pipeline (-{self.pass_name})."
        return "This is a bug in treespec, nothing was converted: please report it with the model's code."


@dataclass(eq=False, kw_only=True)
class InvalidPipeline(TreespecError, ValueError):
    """A pipeline string, or the order it asks for, that cannot be run."""

    got: str
    expected: str
    fix: str = "`treespec passes` lists the passes in order."
    template: ClassVar[str] = "Invalid pipeline: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class InvalidKernel(TreespecError, ValueError):
    """A kernel that cannot be registered."""

    name: str
    got: str
    expected: str
    fix: str = "docs/writing-a-kernel.md says what a kernel is registered with."
    template: ClassVar[str] = "Invalid kernel {e.name!r}: got {e.got}, expected {e.expected}. {e.fix}"
