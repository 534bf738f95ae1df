"""`treespec compile`, and the commands that run what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_pair import PROMPT, character_tokenizer

from treespec_compiler.cli.main import main
from treespec_compiler.runtime.folder_tokenizer import FolderTokenizer, tokenizer_texts

TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message.role == 'system' %}{{ raise_exception('no systems') }}{% endif %}\n"
    "<{{ message.role }}>{{ message.content | tojson }}{{ unk_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(pair: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("compiled") / "out"
    words = ["compile", pair.target, "-o", str(where), "--draft", pair.draft, "--draft", "ngram"]
    assert main([*words, "--option", "lowering=eager", "--json"]) == 0
    return where


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder_says_what_the_model_says(
    folder: Path, pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--expansion", "2,1")
    found = answer(capsys, *asked)
    assert found["ids"] == pair.expected and found["text"] == pair.text
    assert found["stats"]["nodes"] > found["stats"]["steps"]
    alone = answer(capsys, *asked, "--draft", "none")
    assert alone["ids"] == pair.expected and alone["stats"]["nodes"] == alone["stats"]["steps"]


@pytest.mark.rare
def test_a_folder_explains_itself(folder: Path, pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "explain", str(folder))
    model = answer(capsys, "explain", pair.target, "--option", "lowering=eager")
    for name in ("sites", "positions", "context", "local_ops", "signature", "result"):
        assert found[name] == model[name], name
    assert found["made"]["elsewhere"] == []
    assert main(["explain", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "attention sites" in out and "made with" in out and "compared with the eager model" in out
    assert main(["explain", str(folder), "--mesh", "tp=2"]) == 2
    assert "--mesh" in capsys.readouterr().err


def test_commands_that_need_a_model_say_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["opt", str(folder)]) == 2
    assert "a compiled folder, which holds a program and no model" in capsys.readouterr().err


def test_a_draft_of_a_file_is_not_shipped(
    pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", pair.target, "-o", str(tmp_path / "x"), "--draft", "early-exit:head.safetensors"]) == 2
    assert "a name without a file" in capsys.readouterr().err


def test_the_tokenizer_is_that_of_the_model() -> None:
    theirs = character_tokenizer()
    theirs.chat_template = TEMPLATE
    texts = tokenizer_texts(theirs)
    found = FolderTokenizer(texts["tokenizer.json"], json.loads(texts["tokenizer_about.json"]))
    for text in (PROMPT, "", "x \u4f60 y"):
        assert found.encode(text) == theirs.encode(text) == found(text)["input_ids"]
    assert found.decode([5, 6, 7]) == theirs.decode([5, 6, 7]) and found.get_vocab() == theirs.get_vocab()
    asked = [{"role": "user", "content": 'a "word"'}]
    for more in ({}, {"add_generation_prompt": True}):
        told = found.apply_chat_template(asked, tokenize=False, **more)
        assert told == theirs.apply_chat_template(asked, tokenize=False, **more)
    assert found.apply_chat_template(asked) == found.encode(str(found.apply_chat_template(asked, tokenize=False)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_is_kept_in_its_sandbox(template: str) -> None:
    tokenizer = FolderTokenizer(tokenizer_texts(character_tokenizer())["tokenizer.json"], {"chat_template": template})
    with pytest.raises(Exception, match=r"no|unsafe|undefined|safely|loader"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_slow_tokenizer_is_left_out() -> None:
    assert tokenizer_texts(SimpleNamespace(encode=str, decode=str)) == {}
