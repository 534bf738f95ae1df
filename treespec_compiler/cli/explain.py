"""Say whether a model can be converted, and what was proved about it; or why it was refused, and what would help."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import InvalidFolder, InvalidOption, Unsupported
from ..inspection.explain import CutSummary, Explanation, explain, explain_cut, explanation_of
from ..inspection.offload import OffloadSummary, explain_offload
from ..passes.show.snapshot import short_source
from ..program.folder.manifest import Origin, read_manifest
from .arguments import add_json, add_model_arguments, add_offload, mapped_under, refuse_offload, with_offload
from .inspection import CONVERTED, EXIT_CODES, REFUSED, console, parameter_count, read_subject
from .models import is_compiled

EPILOG = f"""\
examples:
  treespec explain demo
  treespec explain hf:mistral --random-weights --tiny
  treespec explain smollm2 --mesh tp=3
  treespec explain FOLDER                                 (which `treespec compile` wrote)
  treespec explain hf:PATH --offload disk --resident-gb 2
  treespec explain py:mypackage.models:build --json

{EXIT_CODES}
"""


def configure(parser: ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("--mesh", metavar="MESH", help="how it would be cut for these ranks, too: tp=4 or tp=2,pp=2")
    add_offload(parser)
    add_json(parser)


def run(arguments: Namespace) -> int:
    if is_compiled(arguments.model):
        return _folder(arguments)
    subject = read_subject(arguments, mapped_under(arguments))
    meshed = replace(subject.options, mesh=arguments.mesh)
    offloaded = with_offload(subject.options, arguments)
    cut: list[CutSummary] = []
    streamed: OffloadSummary | None = None
    model = subject.loaded.model
    found: Explanation | Unsupported
    try:
        with Console(stderr=True).status("converting"):
            streamed = None if offloaded.offload is None else explain_offload(model, subject.call, offloaded)
            found = explain(model, subject.call, replace(subject.options, offload=None))
            cut = [] if arguments.mesh is None else explain_cut(subject.loaded.model, subject.call, meshed)
    except Unsupported as error:
        found = error
    if arguments.json:
        head = {"model": subject.name, "converted": not isinstance(found, Unsupported)}
        body = refusal_fields(found) if isinstance(found, Unsupported) else found.as_json()
        body |= {"cut": asdict(cut[0])} if len(cut) == 1 else {}
        body |= {"stages": [asdict(each) for each in cut]} if len(cut) > 1 else {}
        body |= {"offload": asdict(streamed) | {"seconds": streamed.seconds}} if streamed is not None else {}
        print(json.dumps(head | body, indent=2))
    else:
        parameter = next(model.parameters(), None)
        where = f", {arguments.dtype} on {parameter.device}" if parameter is not None else ""
        title = f"{type(model).__name__}, {parameter_count(subject.loaded)} parameters{where}"
        if isinstance(found, Unsupported):
            show_refusal(console(), subject.name, title, found)
        else:
            show_explanation(console(), subject.name, title, found)
            for each in cut:
                show_cut(console(), arguments.mesh, each)
            if streamed is not None:
                show_offload(console(), streamed)
    return REFUSED if isinstance(found, Unsupported) else CONVERTED


def _folder(arguments: Namespace) -> int:
    """What was proved when a folder was written; its program is not loaded."""
    if arguments.mesh is not None:
        fix = "Explain the model that it was compiled from."
        raise InvalidOption(name="--mesh", got=arguments.mesh, expected="no mesh for a compiled folder", fix=fix)
    refuse_offload(arguments)
    folder = Path(arguments.model).expanduser()
    manifest = read_manifest(folder)
    try:
        found = explanation_of(manifest.proof)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        got = f"a proof that cannot be read ({type(error).__name__}: {error})"
        raise InvalidFolder(folder=str(folder), got=got, expected="what `treespec compile` wrote") from error
    origin, model = manifest.origin, manifest.model
    if arguments.json:
        made = asdict(origin) | {"elsewhere": Origin.here().differences(origin)}
        print(json.dumps({"model": arguments.model, "converted": True, "made": made, **found.as_json()}, indent=2))
        return CONVERTED
    out = console()
    title = f"{model.get('type')}, {model.get('parameters', 0) / 1e6:,.1f}M parameters, {model.get('dtype')}, compiled"
    show_explanation(out, arguments.model, title, found)
    told = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    out.print(f"\n[bold]made with[/] {escape(told)} on {escape(origin.machine)} ({escape(origin.cpu)})")
    for difference in Origin.here().differences(origin):
        out.print(f"  {escape(difference)}: the graph is lowered again here", style="yellow")
    return CONVERTED


def refusal_fields(error: Unsupported) -> dict[str, Any]:
    source = short_source(error.source) if error.source else None
    fields = {
        "kind": str(error.kind),
        "reason": error.reason,
        "node": error.node,
        "source": source,
        "layer": error.layer,
        "module": error.module,
    }
    return fields | {"way_out": error.way_out or error.DEFAULT_WAY_OUT}


def show_refusal(out: Console, name: str, title: str, error: Unsupported) -> None:
    out.print(f"[bold red]refused[/]  {escape(name)} ({escape(title)})")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in refusal_fields(error).items():
        if value:
            table.add_row(key.replace("_", " "), escape(str(value)))
    out.print(table)


def show_explanation(out: Console, name: str, title: str, found: Explanation) -> None:
    out.print(f"[bold green]converted[/]  {escape(name)} ({escape(title)})")
    out.print(f"context: {escape(found.context)}\n")
    out.print(f"[bold]attention sites[/] ({len(found.sites)})")
    out.print(sites_table(found))
    out.print(f"KV cache: {found.bytes_per_token:,} bytes per token over all sites (KV B: of one)\n")
    if found.states:
        out.print(f"[bold]states[/] ({len(found.states)}), of a fixed size for each sequence")
        for site in found.states:
            by = f"; by {site.kernel}" if site.kernel else ""
            bytes = f"{site.bytes_per_slot:,} B"
            out.print(f"  {site.index} {escape(site.module)}: {site.kind}, {site.formula}; {bytes}{escape(by)}")
        out.print()
    out.print("[bold]positions[/]")
    for formula, reader in found.positions:
        out.print(f"  {formula} read at {escape(reader)}", soft_wrap=True)
    if not found.positions:
        out.print("  none: the model does not read positions")
    out.print(
        f"\n[bold]token locality[/]: {found.local_values} values carry tokens, each made by an op proved to act on"
    )
    movers = "the attention sites and the states" if found.states else "the attention sites"
    out.print(f"each token alone; only {movers} move information between tokens")
    out.print("  " + ", ".join(f"{op} {n}" for op, n in found.local_ops.items()))
    out.print("\n[bold]compared with the eager model[/], run op by op")
    out.print(f"  {found.comparison}", soft_wrap=True)
    out.print("\n[bold]tree program[/]")
    for parameter, text, meaning in found.signature:
        out.print(f"  {parameter}: {escape(text)}  [dim]{escape(meaning)}[/]", soft_wrap=True)
    out.print(f"  -> {escape(found.result)}")


def show_cut(out: Console, mesh: str, cut: CutSummary) -> None:
    out.print(f"\n[bold]across ranks[/] ({escape(mesh)}{_stage_text(cut)})")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("weights", "placement"):
        table.add_column(column, overflow="fold")
    for column in ("bytes", "of a rank"):
        table.add_column(column, justify="right", no_wrap=True)
    for weight in cut.weights:
        table.add_row(
            escape(", ".join(weight.names)), escape(weight.placement), f"{weight.whole_bytes:,}", f"{weight.bytes:,}"
        )
    out.print(table)
    share = cut.bytes / cut.whole_bytes
    out.print(f"weights: {cut.bytes:,} bytes on a rank of {cut.whole_bytes:,} ({share:.0%})")
    if cut.stage is not None and cut.stage.hands_on:
        out.print(f"handed to the next stage: {cut.stage.hands_on:,} bytes of a rank for each token")
    if cut.ranks == 1:
        return
    products = ", ".join(f"{count} {kind}" for kind, count in cut.products.items())
    out.print(f"products: {products}; attention sites cut: {cut.sites - cut.whole_sites} of {cut.sites}")
    reduces = [c for c in cut.collectives if c.kind == "all_reduce"]
    sent = sum(c.bytes_per_row for c in cut.collectives)
    out.print(
        f"collectives of a step: {len(reduces)} all_reduce, {len(cut.collectives) - len(reduces)} all_gather; "
        f"{sent:,} bytes of a rank for each token whose logits are wanted"
    )


def _stage_text(cut: CutSummary) -> str:
    stage = cut.stage
    if stage is None:
        return ""
    one = stage.stop - stage.start == 1
    layers = f"layer {stage.start}" if one else f"layers {stage.start} to {stage.stop - 1}"
    names = stage.names[0] if one else " .. ".join(stage.names)
    ranks = ", ".join(map(str, stage.ranks))
    return f"; stage {stage.index} of {stage.count}, rank{'s' * (len(stage.ranks) > 1)} {ranks}: {layers}, {names}"


def show_offload(out: Console, found: OffloadSummary) -> None:
    out.print("\n[bold]streamed weights[/]")
    if not found.streamed_layers:
        out.print(f"  none: all {found.resident_bytes:,} bytes fit")
        return
    stay = found.layers - found.streamed_layers
    out.print(f"  in memory: {found.resident_bytes:,} bytes, the first {stay} of {found.layers} layers among them")
    out.print(f"  ring: {found.ring_bytes:,} bytes")
    out.print(f"  read in every step: {found.streamed_bytes:,} bytes of {found.streamed_layers} layers")
    out.print(
        f"  a step takes at least {found.seconds:.3f} s: {found.rate / 1e9:.2f} GB/s from {escape(found.files)}",
        soft_wrap=True,
    )


def sites_table(found: Explanation) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("module", overflow="fold", min_width=8)
    table.add_column("heads/KV/dim", no_wrap=True)
    table.add_column("mask", overflow="fold", min_width=6)
    table.add_column("bias", overflow="fold", min_width=4)
    for column in ("cap", "sinks", "pos"):
        table.add_column(column, no_wrap=True)
    table.add_column("KV B", justify="right", no_wrap=True)
    for site in found.sites:
        dims = str(site.key_dim) if site.key_dim == site.value_dim else f"{site.key_dim}+{site.value_dim}"
        table.add_row(
            str(site.index),
            escape(site.module),
            f"{site.heads}/{site.kv_heads}/{dims}",
            escape(site.mask),
            escape(site.bias) or "-",
            f"{site.softcap:g}" if site.softcap else "-",
            "yes" if site.sinks else "-",
            site.positions or "-",
            str(site.bytes_per_token),
        )
    return table
