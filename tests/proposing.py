"""What a draft proposes, its work run by itself."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from treespec_compiler.speculation.policies.protocol import Limits, TreePolicy
from treespec_compiler.speculation.proposal import Proposal
from treespec_compiler.speculation.work import alone


def propose(session: Any, policy: TreePolicy, limits: Limits) -> Proposal:
    found = session.propose(policy, limits)
    return alone(found) if isinstance(found, Generator) else found
