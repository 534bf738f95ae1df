"""Text from ids as they arrive: the whole text, no half characters, and no more work a token as it gets longer."""

from __future__ import annotations

import random

import pytest

from treespec_compiler.runtime.text import KEPT, REPLACEMENT, TextStream

tokenizers = pytest.importorskip("tokenizers")


class Bytes:
    """An id a byte."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids, **_):
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")


def byte_fallback():
    """As in sentencepiece: a space before each word, taken away before the first."""
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": 1 + i for i in range(256)}, "▁Hello": 257, "▁world": 258, "!": 259}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return found


def word_piece():
    words = ["[UNK]", "do", "n", "'", "t", "go", ",", ".", "##ing"]
    found = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    found.decoder = tokenizers.decoders.WordPiece(cleanup=True)
    return found


class Plain:
    """Without the keywords of transformers."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids, **_):
        return self.tokenizer.decode(ids)


CASES = {
    "bytes": (Bytes(), [*"héllo 👩‍👩‍👧‍👦 日本語テスト 🇫🇷 a\u0301 x\n\n  y\t".encode()] * 9),
    "cut within a character": (Bytes(), [*"half: 🎉".encode()][:-1]),
    "byte fallback": (Plain(byte_fallback()), [257, 258, *(1 + b for b in "🎉é".encode()), 259, 257, 258, 259] * 20),
    "broken bytes": (Plain(byte_fallback()), [257, 1 + 0xF0, 259, 258, 1 + 0x9F, 1 + 0x8E, 258] * 20),
    "clean-up": (Plain(word_piece()), [1, 2, 3, 4, 5, 8, 6, 5, 7] * 20),
    "ids": (None, [5, 17, 3] * 50),
}


@pytest.mark.parametrize("step", [1, 2, 7, 200])
@pytest.mark.parametrize("name", CASES)
def test_the_pieces_are_the_text(name, step):
    tokenizer, ids = CASES[name]
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    pieces.append(stream.finish())
    wanted = "".join(f"{i} " for i in ids) if tokenizer is None else tokenizer.decode(ids)
    assert "".join(pieces) == stream.shown == wanted
    if REPLACEMENT not in wanted:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_random_bytes():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.choice((rng.randrange(128), rng.randrange(256))) for _ in range(rng.randrange(4 * KEPT))]
        stream = TextStream(Bytes())
        assert "".join([stream.push([i]) for i in ids] + [stream.finish()]) == Bytes().decode(ids)


def test_a_long_text_costs_no_more_a_token():
    costs = []
    for count in (1000, 4000):
        tokenizer = Bytes()
        stream = TextStream(tokenizer)
        for i in range(count):
            stream.push([97 + i % 26])
        costs.append(tokenizer.decoded / count)
    assert costs[1] < 1.1 * costs[0]
