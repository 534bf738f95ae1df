"""The command line: what it prints, what it refuses, and that its output is the target's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pair import PROMPT

from treespec_compiler.cli.main import main
from treespec_compiler.cli.text import TextStream

transformers = pytest.importorskip("transformers")


def treespec(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TREESPEC_LOWERING": "eager", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "treespec_compiler", *map(str, arguments)]
    if cwd is not None:
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.mark.slow
def test_demo(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from treespec_compiler import demo

    lines = [{"module": "m", "line": 3, "text": f"def f{i}(x):\n    return x"} for i in range(5)]
    (pair.folder / "heldout.json").write_text(json.dumps(lines))
    monkeypatch.setattr(demo, "paths", demo.Paths(pair.folder))
    assert main(["demo", "--prompts", "2", "--max-new-tokens", "10", "--option", "lowering=eager"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("identical: yes")
    for text in ("m, line 3: held out", "guessed by the draft: «like this»", "one verified tree", "└─ [0] "):
        assert text in shown
    for row in ("Hugging Face generate", "compiled static-cache loop", "treespec"):
        assert row in shown


def test_help_and_version() -> None:
    overview = treespec()
    assert overview.returncode == 0 and overview.stderr == ""
    assert "usage: treespec" in overview.stdout and "generate" in overview.stdout and "examples:" in overview.stdout
    assert overview.stdout == treespec("--help").stdout
    assert treespec("--version").stdout.startswith("treespec ")
    assert "--expansion" in treespec("generate", "--help").stdout


def test_generate_prints_the_targets_own_text(pair: SimpleNamespace) -> None:
    result = treespec(
        "generate", "--target", pair.target, "--draft", pair.draft, "--prompt", PROMPT, "--max-new-tokens", 12
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == pair.text + "\n"
    assert "12 tokens in" in result.stderr


def test_generate_json_and_stream(pair: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    common = ["generate", "--target", pair.target, "--draft", pair.draft, "--prompt-file", str(prompt)]
    common += ["--max-new-tokens", "12", "--expansion", "2,2", "--option", "lowering=eager"]
    assert main([*common, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ids"] == pair.expected and record["text"] == pair.text
    assert record["stats"]["tokens"] == 12 and record["stats"]["steps"] >= 1

    assert main([*common, "--stream"]) == 0
    assert capsys.readouterr().out == pair.text + "\n"

    assert main([*common, "--stream", "--json"]) == 0
    *steps, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [token for step in steps for token in step["tokens"]] == pair.expected == last["ids"]
    assert steps[0]["tree"] is None and len(steps[1]["tree"]["tokens"]) == 7


def test_generate_with_random_weights_needs_the_configuration_only(
    pair: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((pair.folder / "target" / "config.json").read_text())
    call = ["generate", "--target", f"hf:{tmp_path}", "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    call += ["--option", "lowering=eager", "--json"]
    assert main([*call, "--random-weights"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["ids"]) == 4 and record["text"] is None
    assert main(call) == 2
    assert "a folder without weights" in capsys.readouterr().err


@pytest.mark.rare
def test_factory_of_a_module_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text("def broken():\n    raise RuntimeError('no GPU here.')\n")
    result = treespec("generate", "--target", "py:factories:broken", "--prompt-ids", "1", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "treespec: error: Cannot read model 'py:factories:broken': got RuntimeError from broken() (no GPU here), "
        "expected py:module:factory, a function that returns an nn.Module or (nn.Module, tokenizer). "
        "The factory is called without arguments; --debug shows its traceback.\n"
    )
    debug = treespec("generate", "--debug", "--target", "py:factories:broken", "--prompt-ids", "1", cwd=tmp_path)
    assert debug.returncode == 2
    assert "Traceback (most recent call last)" in debug.stderr and "RuntimeError: no GPU here." in debug.stderr


def corrupt(folder: Path, what: str) -> None:
    folder.mkdir()
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 8}
    (folder / "config.json").write_text("{" if what == "json" else json.dumps({} if what == "type" else config))
    if what == "code":
        (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    if what == "unknown":
        (folder / "config.json").write_text('{"model_type": "mine"}')
    if what in ("code", "unknown", "encoder"):
        (folder / "model.safetensors").write_bytes(b"")
    if what == "encoder":
        (folder / "config.json").write_text('{"model_type": "t5"}')
    if what == "pickled":
        (folder / "pytorch_model.bin").write_bytes(b"")
    if what == "weights":
        (folder / "model.safetensors").write_bytes(b"not safetensors at all")
    if what == "lacking":
        from safetensors.torch import save_file

        save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("json", "got a config.json that does not parse"),
        ("type", "got a config.json without model_type"),
        ("pickled", "got pickled weights only (pytorch_model.bin)"),
        ("nothing", "got a folder without weights"),
        ("weights", "got SafetensorError from transformers (Error while deserializing header"),
        ("unknown", "got ValueError from transformers (The checkpoint you are trying to load has model type `mine`"),
        ("code", "got a model that comes with code of its own, expected an architecture that transformers has"),
        ("encoder", "got ValueError from transformers (Unrecognized configuration class"),
        ("lacking", "got a checkpoint that lacks 11 of the model's weights (lm_head.weight, "),
    ],
)
def test_unreadable_folders(what: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    corrupt(folder, what)
    assert main(["generate", "--target", f"hf:{folder}", "--prompt-ids", "1"]) == 2
    assert_one_error(capsys.readouterr(), f"Cannot read model 'hf:{folder}': {text}")


def assert_one_error(captured: Any, text: str) -> None:
    error = captured.err.splitlines()[-1]
    assert captured.out == "" and "Traceback" not in captured.err
    assert text in error and error.endswith(".")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "hf:/no/such/folder"], "Cannot read model 'hf:/no/such/folder': got no such folder"),
        (
            ["--target", "llama"],
            "got no known kind of name, expected `hf:...`, `gguf:...`, `py:...`, `demo` or `smollm2`",
        ),
        (["--target", "py:os"], "got no factory in the name"),
        (["--target", "py:os:nothing"], "got no function 'nothing' in os"),
        (["--target", "py:no_such_module:make"], "got ModuleNotFoundError on importing no_such_module"),
        (["--target", "py:os:getcwd"], "got str from getcwd(), expected py:module:factory"),
        (["--target", "py:os:getcwd", "--random-weights"], "Invalid option --random-weights: got 'py:os:getcwd'"),
        (["--target", "x", "--expansion", "1,,2"], "Invalid option expansion: got '1,,2'"),
        (["--target", "x", "--option", "lowring=eager"], "Did you mean 'lowering'?"),
        (["--target", "x", "--option", "lowering"], "got 'lowering', expected NAME=VALUE"),
        (["--target", "x", "--option", "lowering=fast"], "got 'fast', expected 'inductor' or 'eager'"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments, "--prompt-ids", "1,2"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("treespec: error: ") and text in captured.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["explode"], "invalid choice: 'explode'"),
        (["generate"], "one of the arguments FOLDER --target is required"),
        (["generate", "--target", "demo"], "one of the arguments --prompt --prompt-file --prompt-ids is required"),
        (["generate", "--target", "demo", "--prompt", "a", "--max-new-tokens", "0"], "expected a positive integer"),
    ],
)
def test_usage_errors(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and text in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--prompt-ids", "a,b"], "Invalid prompt: got --prompt-ids 'a,b', expected integers such as 5,17,3"),
        (["--prompt-file", "/no/such/file"], "Invalid prompt: got /no/such/file, which cannot be read"),
        (["--prompt", ""], "Invalid prompt: got a text of no tokens, expected at least one token"),
        (["--prompt-ids", "1,97"], "Token id out of range: got 97 at index 1 of the prompt, expected 0 to 96"),
    ],
)
def test_bad_prompts(
    pair: SimpleNamespace, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--target", pair.target, "--option", "lowering=eager", *arguments]) == 2
    assert_one_error(capsys.readouterr(), text)


def test_text_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain_factory.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(["generate", "--target", "py:plain_factory:make", "--prompt", "hello"]) == 2
    finally:
        sys.path.remove(str(tmp_path))
    assert_one_error(capsys.readouterr(), "got text for py:plain_factory:make, which has no tokenizer")


class Utf8:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_stream_holds_back_half_characters() -> None:
    text = TextStream(Utf8())
    pieces = [text.push([byte]) for byte in "aé✓".encode()]
    assert pieces == ["a", "", "é", "", "", "✓"]
    assert text.push([0xE2]) == "" and text.finish() == "\ufffd"
