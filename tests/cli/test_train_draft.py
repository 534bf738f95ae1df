"""treespec train-draft: from files of text to a draft that `generate` reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_pair import PROMPT

from treespec_compiler.cli.main import main


def test_one_command_trains_a_head(pair: SimpleNamespace, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.py", tmp_path / "head"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    command = ["train-draft", pair.target, "--text", str(text), "--out", str(out), "--option", "lowering=eager"]
    command += ["--pieces", "8", "--piece-tokens", "8", "--new-tokens", "8", "--held-out", "2"]
    command += ["--steps", "3", "--texts", "2", "--depth", "2", "--taps", "0,1", "--vocabulary", "40"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [step for step, _ in record["tokens_per_step"]] == [0, 3] and len(record["by_depth"]) == 2
    generate = ["generate", "--target", pair.target, "--draft", f"eagle3:{out}", "--prompt", PROMPT]
    assert main([*generate, "--max-new-tokens", "12", "--policy", "2,1", "--option", "lowering=eager"]) == 0
    assert capsys.readouterr().out == pair.text + "\n"


def test_what_is_refused(pair: SimpleNamespace, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train-draft", pair.target, "--prompts", "p", "--out", str(tmp_path), "--taps", "low"])
    assert "numbers such as 2,15,27" in capsys.readouterr().err
    assert main(["train-draft", pair.target, "--prompts", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "a file of prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("eagle3", ["--members", "2"], "boosted"),
        ("small", ["--sample", "7"], "boosted"),
        ("parallel", ["--layers", "5"], "small or boosted"),
        ("eagle3", ["--start", "demo"], "small or boosted"),
        ("small", ["--taps", "1,2,3"], "eagle3 or parallel"),
        ("boosted", ["--vocabulary", "9"], "eagle3 or parallel"),
        ("eagle3", ["--no-chat"], "--prompts"),
    ],
)
def test_an_option_of_another_kind_is_refused(
    kind: str, given: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["train-draft", "demo", "--kind", kind, "--text", __file__, "--out", str(tmp_path / "out"), *given]
    assert main(call) == 2
    said = capsys.readouterr().err
    assert given[0] in said and f"expected {expected}" in said and not (tmp_path / "out").exists()
