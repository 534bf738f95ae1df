"""Write the shipped layout: target/, draft/, early_exit.safetensors, early_exit.json, heldout.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .corpus import SourceFile, as_hf
from .models import EARLY_EXIT_LAYER, DemoPair


def _save_bf16(model: LlamaForCausalLM, path: Path) -> None:
    with torch.no_grad():
        clean = LlamaForCausalLM(copy.deepcopy(model.config))
        clean.load_state_dict(model.state_dict())
    clean.set_attn_implementation("sdpa")
    clean.generation_config.do_sample = False
    clean.to(torch.bfloat16).save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)


def prompts(files: list[SourceFile], tokenizer: Tokenizer, count: int, low: int = 200, high: int = 400) -> list[dict]:
    """Pieces of held-out modules that start at a def or class and stop at a line end inside an indented body."""
    found: list[dict] = []
    for file in files:
        lines = file.text.splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines) if line.lstrip().startswith(("def ", "class "))]
        wanted = [len(lines) * part // 10 for part in (3, 6, 8)]
        used: set[int] = set()
        for mark in wanted:
            start = next((i for i in starts if i >= mark and i not in used), None)
            if start is None:
                continue
            used.add(start)
            goal = low + (len(found) * 37) % (high - low - 60)
            end, text = start, ""
            while end < len(lines) and len(tokenizer.encode(text).ids) < goal:
                text += lines[end]
                end += 1
            indented = text.splitlines()[-1].startswith("    ") and end < len(lines) and lines[end].startswith("    ")
            size = len(tokenizer.encode(text).ids)
            if indented and low <= size <= high:
                found.append({"module": file.module, "line": start + 1, "tokens": size, "text": text})
    by_module: dict[str, list[dict]] = {}
    for item in found:
        by_module.setdefault(item["module"], []).append(item)
    rounds = [items[r] for r in range(3) for items in by_module.values() if r < len(items)]
    return sorted(rounds[:count], key=lambda p: (p["module"], p["line"]))


def export(pair: DemoPair, tokenizer: Tokenizer, held_out: list[SourceFile], out: Path, prompt_count: int = 32) -> None:
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        _save_bf16(model, out / name)
        as_hf(tokenizer).save_pretrained(out / name)
    weights = {name: tensor.detach().bfloat16().cpu().contiguous() for name, tensor in pair.exit.state_dict().items()}
    save_file(weights, str(out / "early_exit.safetensors"))
    (out / "early_exit.safetensors").chmod(0o644)
    about = {
        "layer": EARLY_EXIT_LAYER,
        "eps": pair.exit.norm.eps,
        "formula": "lm_head(proj.weight @ (norm.weight * rmsnorm(h, eps))), h = hidden state after `layer` layers",
    }
    (out / "early_exit.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "heldout.json").write_text(json.dumps(prompts(held_out, tokenizer, prompt_count), indent=1) + "\n")
