"""The shipped demo pair: complete, small enough, loadable offline, and cheap enough a draft."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
demo = pytest.importorskip("treespec_compiler.demo")

MAX_BYTES = 25_000_000


@pytest.fixture(scope="module")
def pair():
    return demo.load_target(), demo.load_draft()


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_files_are_complete_and_small() -> None:
    for path in (demo.paths.target, demo.paths.draft):
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert (path / name).is_file(), f"{path.name}/{name}"
    for path in (
        demo.paths.early_exit,
        demo.paths.early_exit.with_suffix(".json"),
        demo.paths.heldout,
        demo.paths.root / "README.md",
    ):
        assert path.is_file(), path.name
    total = sum(p.stat().st_size for p in demo.paths.root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert total <= MAX_BYTES, f"{total} bytes"


def test_both_models_read_the_same_tokens() -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (demo.paths.target / name).read_bytes() == (demo.paths.draft / name).read_bytes()
    tokenizer = demo.load_tokenizer()
    text = demo.heldout_prompts()[0].text
    assert tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_draft_is_at_least_twenty_times_cheaper(pair) -> None:
    target, draft = pair
    assert target.config.vocab_size == draft.config.vocab_size
    assert parameters(target) >= 20 * parameters(draft)


def test_weights_are_shipped_in_bf16() -> None:
    from safetensors import safe_open

    for file in (
        demo.paths.target / "model.safetensors",
        demo.paths.draft / "model.safetensors",
        demo.paths.early_exit,
    ):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_greedy_output_is_finite_and_beats_guessing(pair) -> None:
    tokenizer = demo.load_tokenizer()
    ids = tokenizer(demo.heldout_prompts()[0].text, return_tensors="pt")["input_ids"]
    for model, limit in zip(pair, (3.0, 4.0), strict=True):  # measured on all held-out text: 2.19 and 3.24
        with torch.no_grad():
            out = model(ids, labels=ids)
            new = model.generate(ids, max_new_tokens=16, do_sample=False)
        assert torch.isfinite(out.logits).all()
        assert out.loss.item() < limit < math.log(model.config.vocab_size)
        assert new.shape[1] > ids.shape[1]


def test_early_exit_reads_the_layer_it_was_trained_on(pair) -> None:
    from safetensors.torch import load_file

    target, _ = pair
    about = json.loads(demo.paths.early_exit.with_suffix(".json").read_text())
    weights = {name: w.float() for name, w in load_file(demo.paths.early_exit).items()}
    tokenizer = demo.load_tokenizer()
    agreement = torch.zeros(target.config.num_hidden_layers)  # by layer; the last hidden state is normed already
    prompts = demo.heldout_prompts()[:8]
    for prompt in prompts:
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = target(ids, output_hidden_states=True)
            hidden = torch.cat(out.hidden_states[:-1])  # [layers, T, D]
            normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weights["norm.weight"], about["eps"])
            best = target.lm_head(normed @ weights["proj.weight"].T).argmax(-1)
        agreement += (best == out.logits.argmax(-1)).float().mean(-1) / len(prompts)
    assert agreement[about["layer"]] > 10 * agreement[0], agreement
    assert agreement[about["layer"]] > 0.2, agreement  # measured on all held-out text: 0.28


def test_heldout_prompts() -> None:
    prompts = demo.heldout_prompts()
    tokenizer = demo.load_tokenizer()
    assert len(prompts) >= 24
    for prompt in prompts:
        assert prompt.text.endswith("\n")
        assert 200 <= len(tokenizer(prompt.text)["input_ids"]) <= 400
