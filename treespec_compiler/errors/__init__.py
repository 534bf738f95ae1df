"""Every error treespec raises on purpose: a class each, a fixed text each.

A text says what was got, what was expected and what to do next. Classes are dataclasses: raise them with keyword
arguments (`raise CacheOverflow(slot=0, length=10, new=8, capacity=16)`); the fields stay readable on the exception.
"""

from __future__ import annotations

from .base import (
    TreespecError,
)
from .calls import (
    InvalidFolder,
    InvalidForest,
    InvalidOption,
    InvalidPath,
    InvalidPrompt,
    InvalidTree,
    LossyPair,
    TokenizerMismatch,
    TokenOutOfRange,
    UnknownOption,
    UnknownSlot,
    UnreadableModel,
    UnsavableProgram,
    WrongType,
)
from .compiling import (
    CaptureFailed,
    CorruptTable,
    InvalidKernel,
    InvalidMixer,
    InvalidPipeline,
    InvalidWeight,
    MissingCompiler,
    MissingPackage,
    PassError,
    WrongKernel,
)
from .refusals import (
    Refusal,
    Unsupported,
)
from .running import (
    CacheOverflow,
    ContextOverflow,
    DraftFailed,
    EngineClosed,
    HiddenStart,
    InvalidLogits,
    ModelFailed,
    NoRoomForWeights,
    OutOfPages,
    RankFailed,
    RankLost,
    RanksDiffer,
    RequestTooLarge,
    StaleCache,
    WeightsUnreadable,
)

__all__ = [
    "CacheOverflow",
    "CaptureFailed",
    "ContextOverflow",
    "CorruptTable",
    "DraftFailed",
    "EngineClosed",
    "HiddenStart",
    "InvalidFolder",
    "InvalidForest",
    "InvalidKernel",
    "InvalidLogits",
    "InvalidMixer",
    "InvalidOption",
    "InvalidPath",
    "InvalidPipeline",
    "InvalidPrompt",
    "InvalidTree",
    "InvalidWeight",
    "LossyPair",
    "MissingCompiler",
    "MissingPackage",
    "ModelFailed",
    "NoRoomForWeights",
    "OutOfPages",
    "PassError",
    "RankFailed",
    "RankLost",
    "RanksDiffer",
    "Refusal",
    "RequestTooLarge",
    "StaleCache",
    "TokenOutOfRange",
    "TokenizerMismatch",
    "TreespecError",
    "UnknownOption",
    "UnknownSlot",
    "UnreadableModel",
    "UnsavableProgram",
    "Unsupported",
    "WeightsUnreadable",
    "WrongKernel",
    "WrongType",
]
