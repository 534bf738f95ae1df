"""Python's standard library as training text: file list, held-out modules, tokenizer, token memmaps."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .models import END_OF_TEXT, MAX_POSITIONS, VOCAB

END_TOKEN = "<|endoftext|>"

# Whole modules the models never see; neither do their tests (test_<module>.py, test/test_<module>/).
HELD_OUT = (
    "argparse", "bisect", "calendar", "cmd", "colorsys", "configparser", "contextlib", "csv",
    "dataclasses", "difflib", "fileinput", "fnmatch", "fractions", "functools", "getopt",
    "graphlib", "heapq", "imaplib", "netrc", "pprint", "queue", "sched", "selectors", "shelve",
    "shlex", "statistics", "string", "tarfile", "tempfile", "textwrap", "timeit", "zipfile",
)  # fmt: skip

# Generated tables and data with unusual encodings: nothing to learn from for code.
EXCLUDED_PARTS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "bad_coding",
    "bad_coding2.py",
}
EXCLUDED_PATHS = ("lib2to3/tests/data", "test/encoded_modules", "test/cjkencodings")
MAX_FILE_BYTES = 400_000


@dataclass(frozen=True)
class SourceFile:
    module: str  # path relative to the library's root, without suffix
    text: str
    is_test: bool


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _held_out_name(relative: Path) -> str | None:
    """The held-out module that this file is, belongs to or tests."""
    names = {part.removesuffix(".py").removeprefix("_py").strip("_") for part in relative.parts}
    for module in HELD_OUT:
        if module in names or f"test_{module}" in names:
            return module
    return None


def read_library(root: Path | None = None) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training files, held-out modules), sorted by path, identical files dropped."""
    root = root or stdlib_root()
    seen: set[str] = set()
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS & set(relative.parts) or str(relative).startswith(EXCLUDED_PATHS):
            continue
        raw = path.read_bytes()
        if not 64 <= len(raw) <= MAX_FILE_BYTES:
            continue
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        parts = set(relative.parts[:-1])
        is_test = bool(parts & {"test", "tests", "idle_test"}) or relative.name.startswith("test_")
        file = SourceFile(str(relative.with_suffix("")), text, is_test)
        if _held_out_name(relative) is None:
            train.append(file)
        elif not is_test and len(relative.parts) == 1:
            held_out.append(file)
    return train, held_out


def train_tokenizer(files: list[SourceFile]) -> Tokenizer:
    """Byte-level BPE of VOCAB entries, learned on the library's code without its tests."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.text for f in files if not f.is_test), trainer)
    assert tokenizer.token_to_id(END_TOKEN) == END_OF_TEXT
    return tokenizer


def as_hf(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def encode(tokenizer: Tokenizer, files: list[SourceFile]) -> np.ndarray:
    """<|endoftext|> file <|endoftext|> file ... as uint16 [N]"""
    ids: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch([f.text for f in files]):
        ids.append(np.array([END_OF_TEXT, *encoding.ids], dtype=np.uint16))
    return np.concatenate(ids)


def prepare(work: Path, seed: int) -> Tokenizer:
    """Write tokenizer.json and {library,tests,heldout}.npy under `work`, once."""
    if (work / "corpus.json").exists():
        return Tokenizer.from_file(str(work / "tokenizer.json"))
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = read_library()
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(work / "tokenizer.json"))
    order = np.random.default_rng(seed).permutation(len(train))
    shuffled = [train[i] for i in order]
    splits = {
        "library": [f for f in shuffled if not f.is_test],
        "tests": [f for f in shuffled if f.is_test],
        "heldout": held_out,
    }
    summary: dict[str, dict[str, int]] = {}
    for name, files in splits.items():
        ids = encode(tokenizer, files)
        np.save(work / f"{name}.npy", ids)
        summary[name] = {"files": len(files), "bytes": sum(len(f.text.encode()) for f in files), "tokens": len(ids)}
    (work / "corpus.json").write_text(json.dumps(summary, indent=1))
    return tokenizer


class Batches:
    """Random windows of the token files; step i always yields the same batch for the same seed."""

    def __init__(self, work: Path, seed: int, test_share: float = 0.3) -> None:
        self.library = np.load(work / "library.npy", mmap_mode="r")
        self.tests = np.load(work / "tests.npy", mmap_mode="r")
        self.seed, self.test_share = seed, test_share

    def batch(self, step: int, rows: int, length: int) -> np.ndarray:
        """int64 [rows, length + 1]"""
        rng = np.random.default_rng((self.seed, step))
        out = np.empty((rows, length + 1), dtype=np.int64)
        for row in range(rows):
            ids = self.tests if rng.random() < self.test_share else self.library
            start = int(rng.integers(0, len(ids) - length - 1))
            out[row] = ids[start : start + length + 1]
        return out


def fixed_windows(ids: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Evenly spaced evaluation windows, int64 [rows, length + 1]"""
    starts = np.linspace(0, len(ids) - length - 1, rows).astype(np.int64)
    return np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)
