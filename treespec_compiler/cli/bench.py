"""Measure a server under load, tokens a second and how long clients wait; or a step whose weights are streamed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import InvalidOption
from ..serving.clients import PERCENTILES, Endpoint, Measurement, measure
from ..versions import versions
from . import bench_offload
from .arguments import MODEL, add_offload, positive

EPILOG = """\
examples:
  treespec bench serve demo --draft demo --clients 1,4,16
  treespec bench offload hf:PATH --offload disk --resident-gb 1 --draft suffix --timeline out.svg
  treespec bench serve --url http://localhost:8000/v1 --clients 1,8,64 --requests 256 --output load.json

Each client sends its next request when the last one is answered. Without --url a server is started for the time of
the measurement, with the arguments of `treespec serve`, and ended.

exit codes: 0 measured, 1 requests failed, 2 error
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("serve", "offload"), help="a server under load, or steps of streamed weights")
    started = parser.add_argument_group("a server of its own (see `treespec serve`)")
    started.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    for name in ("--draft", "--option"):
        started.add_argument(name, metavar=name[2:].upper(), action="append", default=[])
    for name in ("--policy", "--max-requests", "--max-queue", "--dtype"):
        started.add_argument(name, metavar="X")
    add_offload(started)
    bench_offload.add_arguments(parser)
    running = parser.add_argument_group("a server that runs already")
    running.add_argument("--url", help="where it is, with the /v1 at the end")
    running.add_argument("--api-key-file", metavar="F", type=Path, help="a file with the key it asks for")
    load = parser.add_argument_group("load")
    load.add_argument("--clients", type=_numbers, default=[1, 4, 16], help="at once, in turn (default: 1,4,16)")
    load.add_argument(
        "--requests", metavar="N", type=positive, help="for each of them (default: 8 a client, at least 32)"
    )
    load.add_argument("--max-tokens", metavar="N", type=positive, default=64, help="of an answer (default: 64)")
    load.add_argument("--prompts", metavar="F", type=Path, help="a UTF-8 file, a prompt a line (default: the demo's)")
    load.add_argument("--output", metavar="F", type=Path, help="write what was measured as JSON")


def run(arguments: Namespace) -> int:
    if arguments.what == "offload":
        return bench_offload.run(arguments)
    if (arguments.url is None) == (arguments.model is None):
        got = "neither" if arguments.url is None else "both"
        fix = "Name a model to be served, or where a server is."
        raise InvalidOption(name="MODEL, --url", got=got, expected="one of them", fix=fix)
    prompts = _prompts(arguments.prompts)
    screen = Console(stderr=True)
    with _server(arguments, screen) as server:
        try:
            model = server.models()[0]
        except (OSError, ValueError, IndexError) as error:
            expected = "a server of OpenAI's API there"
            raise InvalidOption(name="--url", got=str(error), expected=expected) from error
        loads = [_measured(server, model, prompts, clients, arguments, screen) for clients in arguments.clients]
    reports = [load.report() for load in loads]
    Console().print(_table(reports))
    for problem in sorted({problem for report in reports for problem in report["problems"]}):
        screen.print(f"failed: {problem}", markup=False, style="red")
    if arguments.output is not None:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions("torch", "transformers")}
        settings = {k: str(v) for k, v in vars(arguments).items() if k in SETTINGS and v not in (None, [])}
        report = {"benchmark": "serve", "model": model, **about, "settings": settings, "loads": reports}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if any(report["failed"] for report in reports) else 0


TIMES = {"first_token_seconds": "until the first token", "token_seconds": "a token", "latency_seconds": "a request"}
SETTINGS = ("url", "draft", "policy", "option", "max_requests", "max_tokens", "requests", "prompts", "dtype")


def _measured(
    server: Endpoint, model: str, prompts: list[str], clients: int, arguments: Namespace, screen: Console
) -> Measurement:
    requests = arguments.requests or max(32, 8 * clients)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(f"{clients} clients, first requests", total=clients)
        measure(server, model, prompts[::-1], clients, clients, arguments.max_tokens, lambda: bar.advance(task))
        bar.reset(task, description=f"{clients} clients", total=requests)
        return measure(server, model, prompts, clients, requests, arguments.max_tokens, lambda: bar.advance(task))


def _table(reports: list[dict[str, Any]]) -> Table:
    table = Table("clients", *(str(report["clients"]) for report in reports))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("requests", *(str(report["requests"]) for report in reports))
    table.add_row("failed", *(str(report["failed"]) for report in reports))
    table.add_row("tokens/s", *(f"{report['tokens_per_second']:.1f}" for report in reports))
    table.add_row("requests/s", *(f"{report['requests_per_second']:.2f}" for report in reports))
    shares = (report["accepted_tokens"] / max(1, report["tokens"]) for report in reports)
    table.add_row("tokens that a draft guessed", *(f"{share:.0%}" for share in shares), end_section=True)
    for key, name in TIMES.items():
        for p in PERCENTILES:
            found = [report[key] for report in reports]
            seconds = ("" if one is None else f"{one[f'p{p}']:.3f}" for one in found)
            table.add_row(f"seconds {name}, p{p}", *seconds, end_section=p == PERCENTILES[-1])
    return table


@contextlib.contextmanager
def _server(arguments: Namespace, screen: Console) -> Iterator[Endpoint]:
    """The one of --url, or one of its own in another process, which ends with the measurement."""
    if arguments.url is not None:
        yield Endpoint(arguments.url, None if arguments.api_key_file is None else _text(arguments.api_key_file).strip())
        return
    command = [sys.executable, "-m", "treespec_compiler", "serve", arguments.model, "--port", "0"]
    for name in ("policy", "max_requests", "max_queue", "dtype", "offload", "resident_gb", "ram_gb", "offload_dir"):
        if getattr(arguments, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arguments.max_queue is None:
        command += ["--max-queue", str(max(arguments.clients))]
    for name in ("draft", "option"):
        for value in getattr(arguments, name):
            command += [f"--{name}", value]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = list[str]()
            with screen.status("starting the server"):
                for line in process.stderr:
                    said.append(line)
                    if line.startswith("serving "):
                        break
                else:
                    expected = "a server that starts"
                    raise InvalidOption(name="MODEL", got="".join(said[-3:]).strip(), expected=expected)
            yield Endpoint(said[-1].split()[-1])
        finally:
            process.terminate()
            process.communicate()


def _prompts(path: Path | None) -> list[str]:
    if path is None:
        from .. import demo

        return [prompt.text[:600] for prompt in demo.heldout_prompts()]
    found = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not found:
        raise InvalidOption(name="--prompts", got="an empty file", expected="a prompt a line")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(name=str(path), got=str(error), expected="a readable text file") from error


def _numbers(text: str) -> list[int]:
    try:
        return [positive(word) for word in text.split(",")]
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"got {text!r}, expected positive integers such as 1,4,16") from error
