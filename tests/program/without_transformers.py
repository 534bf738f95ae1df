"""Run by tests in a process of its own: what compiled folders say where transformers cannot be imported."""

from __future__ import annotations

import json
import sys
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3}}
PROMPT = [5, 9, 2, 40, 41]
TOKENS = 12


class Blocked:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "transformers":
            raise ImportError("transformers is not to be imported")


def say(program: Any) -> dict[str, list[int]]:
    import treespec_compiler as treespec

    told = {}
    for name, settings in SETTINGS.items():
        out = treespec.generate(program, PROMPT, max_new_tokens=TOKENS, eos_token_id=(), draft="ngram", **settings)
        told[name] = out.sequences[0].tolist()
    return told


def lowered(program: Any) -> dict[str, Any]:
    """As `say`, and how often something was compiled for it."""
    return {**say(program), "compiled": program.compile_count}


def main(folders: list[str]) -> None:
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    import treespec_compiler as treespec

    for named in folders:
        lowering, _, folder = named.partition("=")
        print(json.dumps(lowered(treespec.load_program(folder, {"lowering": lowering}))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
