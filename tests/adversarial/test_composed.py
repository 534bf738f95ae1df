"""Exact or refused: decoders nobody chose. A new seed in every run, printed; TREESPEC_SEED repeats one.

TREESPEC_DECODERS sets how many (48 in CI), in parts that run side by side; thousands on demand, with a tally that can
be interrupted and taken up again: `python tests/adversarial/tally.py --decoders 5000`.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest
from judging import drawn, judge

SEED = int(os.environ.get("TREESPEC_SEED", time.time_ns() % 1_000_000_007))
DECODERS = int(os.environ.get("TREESPEC_DECODERS", "24"))
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_exact_or_refused(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    tally: Counter[str] = Counter()
    bad: list[str] = []
    for number in range(part, DECODERS, PARTS):
        parts, seed = drawn(SEED, number)
        verdict = judge(parts, seed)
        tally[verdict.kind] += 1
        if verdict.bad:
            bad.append(f"decoder {number}: {parts}, {verdict.kind}: {verdict.text}")
    with capsys.disabled():
        print(f"\nTREESPEC_SEED={SEED} TREESPEC_DECODERS={DECODERS}, part {part}: {dict(tally.most_common())}")
    assert not bad, f"TREESPEC_SEED={SEED}\n" + "\n".join(bad)
