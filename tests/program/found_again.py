"""Decoder types converted and saved by one process, and found again by another, a fresh one with other addresses.

    python tests/program/found_again.py                       # every causal language model of transformers
    python tests/program/found_again.py llama gpt2 --batch 1  # these, each in processes of its own

Tiny random models of `treespec coverage`. The second process must find what the first one saved, convert nothing, and
say what the eager model says. What is not saved is named with the reason that the log has for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOOD = ("found", "not saved", "refused")


class Heard(logging.Handler):
    """Keeps why a program was not saved, or not used."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "not saved" in text or "not used" in text or "given up" in text or "told apart" in text:
            self.said.append(text)


def converted(name: str, programs: Path) -> dict[str, Any]:
    """One type in this process: whether it was found, and whether it says what its model says."""
    import treespec_compiler as treespec
    from treespec_compiler.cli.coverage.models import VOCAB, tiny_model

    heard, log = Heard(), logging.getLogger("treespec.program")
    before, level = set(programs.glob("*.program")), log.level
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    began = time.perf_counter()
    found: dict[str, Any] = {"type": name}
    try:
        model = tiny_model(name)
        program = treespec.tree_program(model, options={"lowering": "eager", "program_cache": str(programs)})
        program.check()
        found |= {"from_cache": program.from_cache, "seconds": time.perf_counter() - began}
        if program.from_cache:  # beside the comparison that every program is put to
            from oracles import assert_decodes

            assert_decodes(model, program, VOCAB, rounds=1)
        found["right"] = program.from_cache is found["from_cache"]
    except treespec.Unsupported as error:
        found["refused"] = str(error).splitlines()[0]
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
    return found | {"heard": heard.said, "wrote": len(set(programs.glob("*.program")) - before)}


def in_a_process(names: Sequence[str], programs: Path, seed: int, timeout: float) -> dict[str, dict[str, Any]]:
    """What a process of its own says of each; those that it does not come to are missing."""
    folders = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    around = dict(os.environ, PYTHONPATH=os.pathsep.join(folders), PYTHONHASHSEED=str(seed))
    command = [sys.executable, __file__, "--worker", str(programs), *names]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=around, cwd=HERE.parents[1]
    ) as process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, errors = process.communicate()
    # NOTE a worker that died has said the types before the one that it died of
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if len(lines) < len(names):
        print(errors[-2000:], file=sys.stderr)
    return {line["type"]: line for line in lines}


def verdict(first: dict[str, Any] | None, second: dict[str, Any] | None) -> tuple[str, str]:
    """(One of `GOOD`, or what is wrong; more about it.)"""
    if first is None or second is None:
        return "no answer", ""
    if "refused" in first and "refused" in second:
        return "refused", first["refused"]
    trouble = next(
        (each.get("error") or each.get("refused") for each in (first, second) if not each.get("right")), None
    )
    if trouble or not (first.get("right") and second.get("right")):
        return "wrong", str(trouble)
    if second["from_cache"] and not first["from_cache"]:
        return "found", f"{second['seconds']:.2f} s instead of {first['seconds']:.2f}"
    return ("not saved" if not first["wrote"] else "missed"), "; ".join(first["heard"] + second["heard"])


def twice(names: Sequence[str], batch: int, timeout: float = 600) -> Iterator[tuple[str, str, str]]:
    """(type, verdict, more about it) of each, as they are known."""
    with tempfile.TemporaryDirectory() as folder:
        for at in range(0, len(names), batch):
            some, programs = names[at : at + batch], Path(folder) / str(at)
            first, second = (in_a_process(some, programs, seed, timeout) for seed in (1, 2))
            for name in some:
                yield name, *verdict(first.get(name), second.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types of transformers (default: all causal language models)")
    parser.add_argument("--batch", type=int, default=8, help="types that two processes share (default: 8)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        for name in arguments.types:
            print(json.dumps(converted(name, arguments.worker)), flush=True)
        return 0
    from treespec_compiler.cli.coverage.models import model_types

    counts: dict[str, int] = {}
    for name, found, more in twice(arguments.types or model_types(), arguments.batch):
        print(f"{name:<28} {found:<10} {more}", flush=True)
        counts[found] = counts.get(found, 0) + 1
    print(", ".join(f"{found}: {count}" for found, count in counts.items()))
    return 0 if set(counts) <= set(GOOD) else 1


if __name__ == "__main__":
    sys.exit(main())
