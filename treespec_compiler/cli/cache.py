"""Show, or remove, the programs that are saved on this disk (option `program_cache`)."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from datetime import datetime
from typing import Any

from rich.markup import escape

from ..errors import InvalidOption
from ..program import kept_code
from ..program.saved.store import Entry, Store
from .arguments import add_json
from .inspection import console

EPILOG = """\
examples:
  treespec cache list
  treespec cache show 29026b88
  treespec cache clear
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("list", "show", "clear", "path"), help="what to do")
    parser.add_argument("name", nargs="?", help="of show: the beginning of a program's name")
    parser.add_argument("--dir", metavar="DIR", help="a folder of programs (default: the user's)")
    add_json(parser)


def run(arguments: Namespace) -> int:
    store = Store(arguments.dir)
    if arguments.action == "path":
        print(store.folder)
        return 0
    if arguments.action == "clear":
        count = store.clear()
        if arguments.dir is None:
            kept_code.clear()
        print(json.dumps({"removed": count}) if arguments.json else f"Removed {count} programs from {store.folder}.")
        return 0
    if arguments.action == "show":
        return _show(store, arguments.name, arguments.json)
    return _list(store, arguments.json)


def _list(store: Store, as_json: bool) -> int:
    found = [_row(store, entry) for entry in store.entries()]
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    out = console()
    for row in found:
        told = f"{row.get('model', 'not readable')}, {row['bytes'] / 1e3:,.0f} kB, used {_time(row['used'])}"
        out.print(f"[bold]{row['name']}[/]  {escape(told)}")
    total = sum(row["bytes"] for row in found)
    out.print(f"{len(found)} programs, {total / 1e6:.1f} MB in {escape(str(store.folder))}", style="dim")
    return 0


def _show(store: Store, name: str | None, as_json: bool) -> int:
    found = [entry for entry in store.entries() if name and entry.name.startswith(name)]
    if len(found) != 1:
        fix = "`treespec cache list` prints the names."
        got = f"{name!r}, with which {len(found)} names begin"
        raise InvalidOption(name="name", got=got, expected="the beginning of one program's name", fix=fix)
    read = store.read(found[0])
    if read is None:
        return 1
    program = read[0]["program"]
    row = _row(store, found[0]) | {
        "path": str(found[0].path),
        "max_context": program["max_context"],
        "masks": sorted({json.dumps(site["mask"]) for site in program["state"]["sites"]}),
        "proved_from": program["proved_from"],
        "passes": [{"name": r["name"], "matches": r["matches"], "seconds": r["seconds"]} for r in program["history"]],
        "functions_traced": len(read[0]["trace"]["digests"]),
    }
    if as_json:
        print(json.dumps(row, indent=2))
        return 0
    out = console()
    for key, value in row.items():
        if key != "passes":
            out.print(f"{key:>16}  {escape(_time(value) if key in ('used', 'saved') else str(value))}")
    for record in row["passes"]:
        out.print(f"{record['name']:>24}  {record['matches']} matches, {record['seconds'] * 1e3:.0f} ms", style="dim")
    return 0


def _row(store: Store, entry: Entry) -> dict[str, Any]:
    read = store.read(entry)
    about = read[0]["about"] if read is not None else {}
    return {"name": entry.name, "bytes": entry.bytes, "used": entry.used, **about}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
