"""examples/training_prompts.py: different prompts of every kind, the same ones for a seed, none of an excluded file."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "examples" / "training_prompts.py"


def test_prompts_of_every_kind() -> None:
    spec = importlib.util.spec_from_file_location("training_prompts", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = list(example.prompts(200, seed=1))
    texts = [text for _, text in found]
    assert len(set(texts)) == 200 and not any("{" in text for kind, text in found if kind not in ("summary", "passage"))
    kinds = collections.Counter(kind for kind, _ in found)
    assert len(kinds) == 8 and min(kinds.values()) > 15
    assert list(itertools.islice(example.prompts(200, seed=1), 50)) == found[:50]
    assert found[:50] != list(example.prompts(50, seed=2))
    excluded = "".join(json.dumps({"turns": [text]}) for text in texts[:10])
    assert not set(texts[:10]) & {text for _, text in example.prompts(200, 1, excluded)}
