"""What a caller gave is not what it should be: trees, prompts, options, pairs, names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import TreespecError


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
class InvalidFolder(TreespecError, ValueError):
    """A folder that `treespec compile` did not write, or that was changed since."""

    folder: str
    got: str
    expected: str
    fix: str = "Write the folder again with `treespec compile`."
    template: ClassVar[str] = "No program is read from {e.folder}: got {e.got}, expected {e.expected}. {e.fix}"


@dataclass(eq=False, kw_only=True)
class UnsavableProgram(TreespecError, ValueError):
    """A program that holds more than data, so that no file can hold it."""

    got: str
    expected: str = "a graph of operators of torch's and treespec's own, over tensors of the model"
    fix: str = "Use the program in the process that converts the model."
    template: ClassVar[str] = "The program cannot be written down: got {e.got}, expected {e.expected}. {e.fix}"
