"""The target writes: prompts go through the batched engine, and a draft that guesses nothing notes what a head reads.

No second pass: hidden states and logits are those that the steps compute anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..program.tree_program import TreeProgram
from ..runtime.generate import generate
from ..runtime.output import BatchOutput
from ..speculation.drafts.protocol import DraftRequest
from ..speculation.policies.protocol import Limits, TreePolicy
from ..speculation.proposal import Proposal
from .manifest import claim, recorded
from .progress import Milestone, Tell, nobody
from .texts import SUFFIX, WrittenText, save

MANIFEST = "texts.json"


@dataclass(frozen=True)
class WritingPlan:
    """How the target's texts are made."""

    new_tokens: int = 128
    """At most, behind each prompt."""
    temperature: float = 0.0
    seed: int = 0
    """Of the first prompt, where the temperature is above 0; the others count on."""
    likeliest: int = 32
    """Ids whose probabilities are kept of each next token."""
    at_once: int = 16
    """Texts of a file; they are written together."""


class Notes:
    """A draft that proposes nothing and keeps what verification gives, by prompt."""

    name, prefill_seconds, compile_seconds = "notes", 0.0, 0.0

    def __init__(self, reads: Sequence[str], likeliest: int) -> None:
        self.reads, self.likeliest = tuple(reads), likeliest
        self.taken: dict[tuple[int, ...], NotesSession] = {}

    def open(self, request: DraftRequest) -> NotesSession:
        session = self.taken[tuple(request.prompt)] = NotesSession(self)
        return session


class NotesSession:
    """One prompt's."""

    def __init__(self, notes: Notes) -> None:
        self.reads, self._likeliest = notes.reads, notes.likeliest
        self._root = -1
        self._hidden: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._logs: list[Tensor] = []

    def read(self, hidden: Mapping[str, Tensor]) -> None:
        if self.reads:
            self._hidden.append(torch.cat([hidden[name] for name in self.reads], -1).bfloat16().cpu())

    def learn(self, tokens: Sequence[int], logits: Tensor) -> None:
        logs, ids = logits.float().log_softmax(-1).topk(min(self._likeliest, logits.shape[-1]))
        self._ids.append(ids.int().cpu())
        self._logs.append(logs.half().cpu())

    def accept(self, tokens: Sequence[int]) -> None:
        self._root = tokens[-1]

    def propose(self, policy: TreePolicy, limits: Limits) -> Proposal:
        return Proposal.root(self._root, proposer="notes")

    def text(self, tokens: Sequence[int], prompt: int) -> WrittenText | None:
        """Of the target's answer but its last token, which is told to no draft; None where that is too short to learn
        from. The first row of probabilities, behind the prompt, is no draft's to guess."""
        tokens = tokens[:-1]
        if len(tokens) < prompt + 2:
            return None
        hidden = torch.cat(self._hidden) if self._hidden else torch.zeros(len(tokens) - 1, 0, dtype=torch.bfloat16)
        ids, logs = torch.cat(self._ids[1:]), torch.cat(self._logs[1:])
        assert len(hidden) == len(tokens) - 1 and len(ids) == len(hidden) - prompt, "a row a token"
        return WrittenText(torch.tensor(tokens), prompt, hidden, ids, logs)

    def close(self) -> None:
        """What was noted is kept."""


def write(
    program: TreeProgram,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    taps: Sequence[str],
    plan: WritingPlan,
    tell: Tell = nobody,
    stage: str = "the target writes",
) -> list[Path]:
    """Files of texts that the target writes behind `prompts`, different ones; files that are there are kept.

    `taps` are names of outputs, as in `TreeProgram.verify`. A folder of the same prompts and plan whose texts have more
    taps is another's. Raises InvalidOption for such a folder, and what `generate` raises.
    """
    said = {**asdict(plan), "taps": list(taps), "prompts": digest(prompts), "target": digest(program.weight_sums)}
    claim(folder / MANIFEST, said, "data")
    groups = [prompts[i : i + plan.at_once] for i in range(0, len(prompts), plan.at_once)]
    files = [folder / f"{number:05}{SUFFIX}" for number in range(len(groups))]
    for number, (group, file) in enumerate(zip(groups, files, strict=True)):
        tell(Milestone(stage, number, len(groups)))
        if not file.exists():
            save(file, _written(program, group, taps, plan, plan.seed + number * plan.at_once))
    tell(Milestone(stage, len(groups), len(groups)))
    return files


def taps_there(folder: Path) -> list[str] | None:
    """Names of the outputs that a folder's texts have; None: there are no texts."""
    said = recorded(folder / MANIFEST)
    return None if said is None else list(said["taps"])


def _written(
    program: TreeProgram, prompts: Sequence[Sequence[int]], taps: Sequence[str], plan: WritingPlan, seed: int
) -> list[WrittenText]:
    notes = Notes(taps, plan.likeliest)
    seeds: Any = [seed + i for i in range(len(prompts))] if plan.temperature else None
    out = generate(
        program,
        [list(prompt) for prompt in prompts],
        draft=notes,
        policy="1",
        max_new_tokens=plan.new_tokens,
        temperature=plan.temperature,
        seed=seeds,
    )
    outputs = out.outputs if isinstance(out, BatchOutput) else (out,)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        text = notes.taken[tuple(prompt)].text(output.sequences[0].tolist(), len(prompt))
        if text is not None:
            found.append(text)
    return found


def digest(values: object) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
