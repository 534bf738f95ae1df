"""Last phase of the demo pair: the target is frozen, the draft and the early exit learn the target's own text.

    python examples/tune_demo_draft.py --work build/demo --out build/demo/export --rows 6144 --steps 2400

Two steps of three use continuations that the target wrote after prompts from training files (three quarters greedy,
one quarter sampled), with its distribution at each generated token; the third uses library text.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from demo_pair import fast_attention
from demo_pair.corpus import Batches, fixed_windows, prepare, read_library
from demo_pair.export import export
from demo_pair.losses import mixed_distribution, soft_cross_entropy
from demo_pair.models import EARLY_EXIT_LAYER, DemoPair
from demo_pair.on_policy import Continuation, continuations
from demo_pair.training import ThreadChoice, describe, evaluate, now
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

log = logging.getLogger("tune_demo_draft")

PROMPT_LENGTHS = (128, 256, 384)
NEW_TOKENS = 192
SAMPLED_SHARE = 0.25


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="export to go on from (its draft; the early exit is then left as it is)"
    )
    parser.add_argument("--rows", type=int, default=6144, help="continuations to generate")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--best-share", type=float, default=0.3, help="part of the loss that is the target's argmax")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the draft")
    parser.add_argument("--exit-lr", type=float, default=6e-4)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end earlier, after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def generate(
    target: LlamaForCausalLM, data: Batches, args: argparse.Namespace, threads: ThreadChoice
) -> list[Continuation]:
    model = LlamaForCausalLM(target.config)
    model.load_state_dict(target.state_dict())
    model.to(args.device, torch.bfloat16)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    pieces: list[Continuation] = []
    rows = 96
    for index in track(range(args.rows // rows), "target writes", refresh_per_second=0.2):
        threads.choose()
        length = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
        prompts = torch.from_numpy(data.batch(index, rows, length)[:, :length]).to(args.device)
        made = continuations(model, prompts, NEW_TOKENS, SAMPLED_SHARE, generator)
        order = torch.randperm(rows)
        pieces += Continuation(made.tokens[order], made.logits[order]).rows(16)
    return pieces


def early_hidden(pair: DemoPair, tokens: Tensor) -> Tensor:
    """[B, T] -> [B, T, D] after EARLY_EXIT_LAYER layers"""
    body = pair.target.model
    hidden = body.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rope = body.rotary_emb(hidden, positions)
    for layer in body.layers[:EARLY_EXIT_LAYER]:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    return hidden


def step_loss(
    pair: DemoPair, tokens: Tensor, teacher: Tensor | None, best_share: float, with_exit: bool = True
) -> Tensor:
    """tokens [B, T]; teacher [B, G, V] for the last G tokens, or None: run the target. -> draft (and exit) losses"""
    inputs = tokens[:, :-1]
    early = None
    with torch.autocast(tokens.device.type, torch.bfloat16):
        with torch.no_grad():
            if teacher is None:
                teacher, early = pair.target_logits(inputs)
            elif with_exit:
                early = early_hidden(pair, inputs)
        count = teacher.shape[1]
        students = [pair.draft_logits(inputs)[:, -count:]]
        if with_exit and early is not None:
            students.append(pair.exit_logits(early[:, -count:]))
    flat = teacher.flatten(0, 1).float()
    wanted = mixed_distribution(flat.softmax(-1), flat.argmax(-1), best_share)
    return torch.stack([soft_cross_entropy(x.flatten(0, 1), wanted) for x in students])


def main() -> None:
    args = arguments()
    console = Console(width=160)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False, console=console)]
    )
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    threads = ThreadChoice(args.threads)
    tokenizer = prepare(args.work, 0)
    data = Batches(args.work, 1000 + args.seed)
    _, held_out = read_library()
    windows = {
        "train": torch.from_numpy(fixed_windows(data.library, 16, 512)).to(args.device),
        "heldout": torch.from_numpy(fixed_windows(np.load(args.work / "heldout.npy"), 32, 512)).to(args.device),
    }
    fast_attention.register()
    pair = DemoPair().to(args.device)
    saved = torch.load(args.work / "checkpoint.pt", map_location="cpu", weights_only=True)
    pair.load_state_dict(saved["pair"])
    if args.start is not None:
        pair.draft.load_state_dict(
            LlamaForCausalLM.from_pretrained(args.start / "draft", dtype=torch.float32).state_dict()
        )
        pair.exit.load_state_dict(load_file(args.start / "early_exit.safetensors"))
    with torch.no_grad():  # the target as shipped
        for weight in pair.target.parameters():
            weight.copy_(weight.bfloat16().float())
    pair.target.requires_grad_(False)
    if args.device == "cpu":
        pair.target.set_attn_implementation(fast_attention.NAME)
        pair.draft.set_attn_implementation(fast_attention.NAME)
    started = now()
    pieces = generate(pair.target, data, args, threads)
    log.info(
        "%d generated tokens in %.0f s", sum(p.logits.shape[0] * p.logits.shape[1] for p in pieces), now() - started
    )

    groups = [{"params": list(pair.draft.parameters()), "peak": args.lr}]
    if args.start is None:
        groups.append({"params": list(pair.exit.parameters()), "peak": args.exit_lr})
    small = [parameter for group in groups for parameter in group["params"]]
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    order = np.random.default_rng(args.seed)
    queue: list[int] = []
    running: Tensor | None = None
    began, done = now(), 0
    for step in track(range(args.steps), "draft learns", refresh_per_second=0.2):
        threads.choose()
        progress = max(step / args.steps, (now() - began) / (60 * args.minutes))
        if progress >= 1:
            break
        done = step + 1
        for group in opt.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 50) * (1 - progress)
        if step % 3 == 2:
            tokens, teacher = torch.from_numpy(data.batch(10**6 + step, 8, 512)).to(args.device), None
        else:
            queue = queue or order.permutation(len(pieces)).tolist()
            piece = pieces[queue.pop()]
            tokens, teacher = piece.tokens, piece.logits
        losses = step_loss(pair, tokens, teacher, args.best_share, args.start is None)
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(small, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        running = losses.detach() if running is None else running.lerp(losses.detach(), 0.02)
        if step % 50 == 0:
            log.info("step %d losses %s, %.0f s", step, [round(x, 3) for x in running.tolist()], now() - started)
        if done % 300 == 0:
            for name, tokens in windows.items():
                log.info("step %d %s: %s", step + 1, name, describe(evaluate(pair, tokens)))
            export(pair, tokenizer, held_out, args.out)
    export(pair, tokenizer, held_out, args.out)
    report = {name: asdict(evaluate(pair, tokens)) for name, tokens in windows.items()}
    report["run"] = {"steps": done, "rows": args.rows, "seconds": round(now() - started)}
    (args.work / "tuning.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
