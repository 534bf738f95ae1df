"""Run a failed conversion again from the folder it left, or find the pass that first changes the graph's meaning."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..inspection.failures import Failure, bisect, read, run_again, same_failure
from ..passes.framework.reproducer import FAILED, reproducer_versions
from .arguments import add_json
from .inspection import console, quiet_torch

EPILOG = """\
examples:
  treespec reproduce ~/.cache/treespec/reproducers/20260101-120000-fuse
  treespec reproduce DIR --bisect

exit codes: 0 it does not fail any more, 1 it still fails, 2 error
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("folder", metavar="DIR", type=Path, help="what a failed conversion wrote")
    parser.add_argument(
        "--bisect", action="store_true", help="find the first pass after which the semantic check fails"
    )
    parser.add_argument("--run-saved-passes", action="store_true", help="run the copies of your passes in the folder")
    add_json(parser)


def run(arguments: Namespace) -> int:
    quiet_torch()
    failure = read(arguments.folder, arguments.run_saved_passes)
    record = _bisect(failure, arguments.json) if arguments.bisect else _again(failure)
    if arguments.json:
        print(
            json.dumps(record | {"recorded": {k: failure.info[k] for k in ("failing_pass", "error", "text")}}, indent=2)
        )
    else:
        _show(failure, record)
    return 1 if record["fails"] else 0


def _again(failure: Failure) -> dict[str, Any]:
    error = run_again(failure)
    text = None if error is None else str(error)
    return {"fails": error is not None, "same": same_failure(failure, error), "text": text}


def _bisect(failure: Failure, quiet: bool) -> dict[str, Any]:
    out = console()
    found = bisect(failure, (lambda _: None) if quiet else (lambda line: out.print(line, markup=False)))
    if found is None:
        return {"fails": False, "pass": None, "text": None}
    return {"fails": True, "pass": found.name, "index": found.index, "text": str(found.error), "runs": found.looked_at}


def _show(failure: Failure, record: dict[str, Any]) -> None:
    out = console()
    info = failure.info
    changed = [
        f"{k} {info['versions'].get(k)} -> {v}"
        for k, v in reproducer_versions().items()
        if info["versions"].get(k) != v
    ]
    if changed:
        out.print(f"versions differ: {', '.join(changed)}", markup=False)
    if info["random_weights"]:
        out.print(f"{len(info['random_weights'])} large weights are random here", markup=False)
    if "pass" in record:
        if record["fails"]:
            out.print(
                f"first wrong pass: {record['pass']} (number {record['index']}), {record['runs']} runs", markup=False
            )
        else:
            out.print("no pass changes what the graph means", markup=False)
    elif not record["fails"]:
        out.print(f"passes now; it failed in {info['failing_pass']}", markup=False)
    else:
        out.print(
            f"{'the same failure' if record['same'] else 'another failure'} in {info['failing_pass']}", markup=False
        )
    if record["text"]:
        out.print(record["text"], markup=False, soft_wrap=True)
        out.print(f"the graph it left: {failure.folder / FAILED}", markup=False, soft_wrap=True)
