"""Co-training: the target learns the text, the draft and the early exit learn the target, in one pass over the data.

Learning rates: warm-up, constant, linear decay to zero (WSD), so the number of steps may be chosen while a run is in
its constant part: a resumed run equals a fresh one with that `steps`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treespec_compiler.user_cache import replacing

from .losses import mixed_distribution, one_hot, soft_cross_entropy
from .models import VOCAB, DemoPair
from .muon import Muon


@dataclass(frozen=True)
class Schedule:
    steps: int
    tokens_per_step: int = 6144
    warmup: int = 100
    decay: float = 0.35  # part of the steps in which the rates fall to zero
    draft_start: int = 410  # before it, only the target learns
    step_512: int = 700  # before it, windows of 256 tokens; from it, 512
    long_steps: int = 80  # last steps, windows of 1024
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    draft_lr: float = 2.5e-3
    text_share: float = 0.2  # part of the draft's loss that is the text's and not the target's

    def rate(self, step: int) -> float:
        """Factor of the target's learning rates"""
        start = self.steps * (1 - self.decay)
        return min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.0, (self.steps - step) / (self.steps - start)))

    def draft_rate(self, step: int) -> float:
        return min(self.rate(step), max(0.0, (step + 1 - self.draft_start) / self.warmup))

    def length(self, step: int) -> int:
        if step >= self.steps - self.long_steps:
            return 1024
        return 512 if step >= self.step_512 else 256


@dataclass(frozen=True)
class Losses:
    """Means over tokens: cross-entropy with the text in nats; agreement = same argmax as the target."""

    target: float
    draft: float
    exit: float
    draft_agreement: float
    exit_agreement: float


def optimizers(pair: DemoPair, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Target matrices by Muon; its embedding and norms by AdamW; all of the draft and the exit by AdamW."""
    matrices, vectors = [], []
    for name, weight in pair.target.named_parameters():
        (matrices if weight.dim() == 2 and "embed_tokens" not in name else vectors).append(weight)
    small = [*pair.draft.parameters(), *pair.exit.parameters()]
    return [
        Muon(matrices, lr=schedule.matrix_lr),
        torch.optim.AdamW(vectors, lr=schedule.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        torch.optim.AdamW(small, lr=schedule.draft_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def forward(pair: DemoPair, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T] -> target, draft and early-exit logits, each [B*T, V] bf16"""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits, early = pair.target_logits(tokens)
        draft, early_exit = pair.draft_logits(tokens), pair.exit_logits(early)
    return logits.flatten(0, 1), draft.flatten(0, 1), early_exit.flatten(0, 1)


def train_step(pair: DemoPair, batch: Tensor, text_share: float, with_draft: bool) -> Tensor:
    """Gradients of CE(target, text) + CE(draft, target mixed with text) + CE(exit, target); [B, T+1] -> 3 losses"""
    labels = batch[:, 1:].flatten()
    if not with_draft:
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits, _ = pair.target_logits(batch[:, :-1])
        loss = soft_cross_entropy(logits.flatten(0, 1), one_hot(labels, VOCAB))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.target.parameters(), 1.0)
        return torch.stack([loss.detach(), torch.zeros(()), torch.zeros(())])
    logits, draft, early_exit = forward(pair, batch[:, :-1])
    teacher = torch.softmax(logits.detach().float(), -1)
    parts = (
        soft_cross_entropy(logits, one_hot(labels, VOCAB)),
        soft_cross_entropy(draft, mixed_distribution(teacher, labels, text_share)),
        soft_cross_entropy(early_exit, teacher),
    )
    sum(parts).backward()
    for module in (pair.target, pair.draft, pair.exit):
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    return torch.stack([p.detach() for p in parts])


@torch.no_grad()
def evaluate(pair: DemoPair, windows: Tensor, rows: int = 8) -> Losses:
    """Fixed windows [R, T+1]"""
    sums = torch.zeros(5)
    for batch in windows.split(rows):
        labels = batch[:, 1:].flatten()
        outputs = [x.float() for x in forward(pair, batch[:, :-1])]
        best = outputs[0].argmax(-1)
        values = [torch.nn.functional.cross_entropy(x, labels) for x in outputs]
        values += [(x.argmax(-1) == best).float().mean() for x in outputs[1:]]
        sums += torch.stack(values).cpu() * len(batch)
    return Losses(*(sums / len(windows)).tolist())


class ThreadChoice:
    """All CPU threads while nobody else needs the cores, one thread otherwise (shared cores stall every barrier).

    Measured on 2 cores: 6400 tokens/s with 2 threads on an idle machine, 1054 with 2 threads beside one busy process.
    """

    def __init__(self, most: int, busy: float = 0.2) -> None:
        self.most, self.busy = most, busy
        self.last = self._clock()

    @staticmethod
    def _clock() -> tuple[float, float]:
        """(wall seconds, CPU seconds spent by all other processes); Linux only, else nobody else exists"""
        stat = Path("/proc/stat")
        if not stat.exists():
            return now(), 0.0
        user, nice, system, *_ = (int(x) for x in stat.read_text().split()[1:4])
        own = os.times()
        return now(), (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.user - own.system

    def choose(self) -> int:
        wall, others = self._clock()
        share = (others - self.last[1]) / max(wall - self.last[0], 1e-3)
        self.last = wall, others
        count = self.most if share < self.busy else 1
        if count != torch.get_num_threads():
            torch.set_num_threads(count)
        return count


def save(path: Path, pair: DemoPair, opts: list[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        torch.save({"pair": pair.state_dict(), "opts": [o.state_dict() for o in opts], **state}, temporary)


def load(path: Path, pair: DemoPair, opts: list[torch.optim.Optimizer]) -> dict[str, Any]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    pair.load_state_dict(saved.pop("pair"))
    for optimizer, state in zip(opts, saved.pop("opts"), strict=True):
        optimizer.load_state_dict(state)
    return saved


def describe(losses: Losses) -> str:
    return "  ".join(f"{k} {v:.3f}" for k, v in asdict(losses).items())


def now() -> float:
    return time.monotonic()
