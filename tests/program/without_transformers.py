"""Run by tests in a process of its own: what compiled folders say where transformers cannot be imported."""

from __future__ import annotations

import json
import sys
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3}}
PROMPT = [5, 9, 2, 40, 41]
TOKENS = 12
NEEDLESS = (
    *("sympy", "networkx", "jinja2", "rich", "pydantic", "triton"),
    *("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx.experimental", "torch.export"),
    *("treespec_compiler.pipeline", "treespec_compiler.passes", "treespec_compiler.capture.capture"),
    *("treespec_compiler.capture.rewriting", "treespec_compiler.capture.python_state", "treespec_compiler.cli"),
)
"""What proves, lowers and prints: nothing that runs code which was kept needs any of it."""
RECORDS = {
    *("treespec_compiler.passes", "treespec_compiler.passes.framework", "treespec_compiler.passes.framework.manager"),
    *("treespec_compiler.passes.framework.state", "treespec_compiler.passes.framework.weights"),
}
"""Of the passes, the modules of what they hand on."""


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


def needless() -> list[str]:
    """Modules of `NEEDLESS` that were imported, but for those that torch itself imports."""
    found = {name for name in sys.modules if any(name == n or name.startswith(f"{n}.") for n in NEEDLESS)}
    return sorted(found - RECORDS - _of_torch)


_of_torch: set[str] = set()


def main(folders: list[str]) -> None:
    """`folders`: `LOWERING=FOLDER`. A line of JSON for each, and one of the needless modules that were imported."""
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    import torch  # noqa: F401

    _of_torch.update(sys.modules)
    import treespec_compiler as treespec

    for named in folders:
        lowering, _, folder = named.partition("=")
        print(json.dumps(lowered(treespec.load_program(folder, {"lowering": lowering}))), flush=True)
    print(json.dumps(needless()))


if __name__ == "__main__":
    main(sys.argv[1:])
