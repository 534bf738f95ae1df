"""Prompts from files: a line each, JSON, chat templates, pieces of texts."""

from __future__ import annotations

import json

import pytest

from treespec_compiler.errors import InvalidOption
from treespec_compiler.training.prompts import pieces, read_prompts


class Letters:
    """A tokenizer of characters."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(letter) for letter in text]


class Chat(Letters):
    chat_template = "<{content}>"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{message['content']}>" for message in messages)


def test_a_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ab\n\nc\n")
    assert read_prompts(file, Letters()) == [[0, 97, 98], [0, 99]]
    assert read_prompts(file, Chat()) == [[60, 97, 98, 62], [60, 99, 62]]
    assert read_prompts(file, Chat(), chat=False) == [[0, 97, 98], [0, 99]]


def test_json_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, ["ab", [5, 6], {"prompt": "c", "other": 1}, {"prompt": [7]}])))
    assert read_prompts(file, Letters()) == [[0, 97, 98], [5, 6], [0, 99], [7]]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 1 of .*, no JSON"), ("[1, true]", "line 1"), ("{}", "line 1"), ("[]", "line 1"), ("7", "line 1")],
)
def test_lines_that_are_no_prompts(tmp_path, line, words):
    (tmp_path / "prompts.jsonl").write_text(line)
    with pytest.raises(InvalidOption, match=words):
        read_prompts(tmp_path / "prompts.jsonl", Letters())


def test_text_needs_a_tokenizer_and_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("ab")
    with pytest.raises(InvalidOption, match="without tokenizer"):
        read_prompts(tmp_path / "prompts.txt", None)
    with pytest.raises(InvalidOption, match="FileNotFoundError"):
        read_prompts(tmp_path / "none.txt", Letters())


def test_pieces_of_texts_begin_with_a_line_and_have_their_length(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.bin")]
    files[0].write_text("".join(f"line {i} of a\n" for i in range(100)))
    files[1].write_text("".join(f"line {i} of b\n" for i in range(100)))
    files[2].write_bytes(b"\xff\xfe\xfd")
    found = pieces(files, Letters(), 20, 12, seed=3)
    texts = ["".join(map(chr, ids[1:])) for ids in found]
    assert 15 < len(texts) <= 20 and all(len(ids) == 12 and text.startswith("line ") for ids, text in zip(found, texts))
    assert found == pieces(files, Letters(), 20, 12, seed=3) != pieces(files, Letters(), 20, 12, seed=4)
    with pytest.raises(InvalidOption, match="texts of 5000 tokens"):
        pieces(files, Letters(), 20, 5000, seed=3)
    with pytest.raises(InvalidOption, match="FileNotFoundError"):
        pieces([tmp_path / "none"], Letters(), 20, 5, seed=3)
