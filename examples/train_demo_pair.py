"""Train the demo pair: an 11.5M-parameter target, a 0.5M-parameter draft and an early-exit head, on CPU or GPU.

    python examples/train_demo_pair.py --work build/demo --out build/demo/export --steps 3000 --threads 2

It reads the standard library of the running Python, holds out whole modules, trains a 1024-entry byte-level BPE, then
co-trains. It resumes from `--work`/checkpoint.pt. `examples/tune_demo_draft.py` then trains the draft on the target's
own continuations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from demo_pair import fast_attention
from demo_pair.corpus import Batches, fixed_windows, prepare, read_library
from demo_pair.export import export
from demo_pair.models import DemoPair
from demo_pair.training import (
    Schedule,
    ThreadChoice,
    describe,
    evaluate,
    load,
    now,
    optimizers,
    save,
    train_step,
)
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("train_demo_pair")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="corpus, tokenizer, checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="exported files")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--export-minutes", type=float, default=12.0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False, console=Console(width=160))]
    )
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    schedule = Schedule(steps=args.steps, tokens_per_step=args.batch_tokens)
    tokenizer = prepare(args.work, args.seed)
    data = Batches(args.work, args.seed)
    _, held_out = read_library()
    windows = {
        "train": torch.from_numpy(fixed_windows(data.library, 16, 512)).to(args.device),
        "heldout": torch.from_numpy(fixed_windows(np.load(args.work / "heldout.npy"), 32, 512)).to(args.device),
    }

    fast_attention.register()
    pair = DemoPair(args.seed).to(args.device)
    for model in (pair.target, pair.draft):
        if args.device == "cpu":
            model.set_attn_implementation(fast_attention.NAME)
        if not args.no_compile:
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = 64
            torch._inductor.config.cpp.dynamic_threads = True
            for layer in model.model.layers:
                layer.compile(dynamic=False)
    opts = optimizers(pair, schedule)
    checkpoint = args.work / "checkpoint.pt"
    done, seconds = 0, 0.0
    if checkpoint.exists():
        state = load(checkpoint, pair, opts)
        done, seconds = state["step"], state["seconds"]
        log.info("resumed at step %d", done)

    wish = args.work / "steps"  # a number written here replaces --steps while the rates are still constant
    threads = ThreadChoice(args.threads)
    saved = started = now()
    exported = started - 60 * (args.export_minutes - 3)
    running: torch.Tensor | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=0.2) as progress:
        task = progress.add_task("training", total=args.steps, completed=done)
        for step in itertools.count(done):
            if wish.exists():
                schedule = replace(schedule, steps=int(wish.read_text()))
            if step >= schedule.steps:
                break
            threads.choose()
            began = now()
            rates = (
                schedule.matrix_lr * schedule.rate(step),
                schedule.vector_lr * schedule.rate(step),
                schedule.draft_lr * schedule.draft_rate(step),
            )
            for opt, rate in zip(opts, rates, strict=True):
                opt.param_groups[0]["lr"] = rate
            length = schedule.length(step)
            batch = torch.from_numpy(data.batch(step, args.batch_tokens // length, length)).to(args.device)
            losses = train_step(pair, batch, schedule.text_share, step >= schedule.draft_start)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            running = losses if running is None else running.lerp(losses, 0.02)
            spent = now() - began
            seconds += spent
            progress.update(task, completed=step + 1)
            if step % 20 == 0:
                rate = args.batch_tokens / spent
                parts = " ".join(f"{x:.3f}" for x in running.tolist())
                log.info(
                    "step %d len %d loss %s %.0f tok/s threads %d", step, length, parts, rate, torch.get_num_threads()
                )
            last = step + 1 == schedule.steps
            if last or (step + 1) % 250 == 0:
                for name, tokens in windows.items():
                    log.info("step %d %s: %s", step + 1, name, describe(evaluate(pair, tokens)))
            if last or now() - saved > 60 * args.checkpoint_minutes:
                save(checkpoint, pair, opts, {"step": step + 1, "seconds": seconds})
                saved = now()
            if last or now() - exported > 60 * args.export_minutes:
                export(pair, tokenizer, held_out, args.out)
                log.info("exported %s", args.out)
                exported = now()

    report = {name: asdict(evaluate(pair, tokens)) for name, tokens in windows.items()}
    report["run"] = {"steps": schedule.steps, "tokens": schedule.steps * args.batch_tokens, "seconds": round(seconds)}
    (args.work / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
