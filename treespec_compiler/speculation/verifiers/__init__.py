"""Stochastic verifiers: one rule a file, each lossless with the child samplers it names."""

from __future__ import annotations

from ...ir.acceptance import Target
from .block import BlockVerification
from .multi_step import MultiStep
from .naive import NaiveSampling
from .recursive import RecursiveRejection
from .rule import StochasticVerifier
from .traversal import TraversalVerification

__all__ = [
    "VERIFIERS",
    "BlockVerification",
    "MultiStep",
    "NaiveSampling",
    "RecursiveRejection",
    "StochasticVerifier",
    "Target",
    "TraversalVerification",
]

VERIFIERS: dict[str, StochasticVerifier] = {
    v.name: v
    for v in (NaiveSampling(), MultiStep(), RecursiveRejection(), TraversalVerification(), BlockVerification())
}
