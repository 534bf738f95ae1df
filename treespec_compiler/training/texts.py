"""Texts that a target has written, on disk: files of a few texts each, with what heads read of the target.

A text of `n` tokens, the first `p` of them a prompt, has the target's hidden states after each token but the last
[n - 1, taps * D] in bfloat16, and, for each token behind the prompt but the last, the target's K likeliest next ids and
their log probabilities [n - 1 - p, K].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnreadableModel
from ..user_cache import replacing

SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class WrittenText:
    """One of them. R, its roots, are the places behind which a draft would have grown a tree."""

    tokens: Tensor
    """[n] int64."""
    prompt: int
    hidden: Tensor
    """[n - 1, taps * D] float32 when it is read, bfloat16 when it is written."""
    ids: Tensor
    """[R, K] int64; row r is of token `prompt + r`."""
    log_probabilities: Tensor
    """[R, K] float32 when it is read, float16 when it is written."""
    counts: Tensor | None = None
    """[R] how much each root counts; None: 1."""

    @property
    def roots(self) -> int:
        return len(self.ids)


def save(path: Path, texts: Sequence[WrittenText]) -> None:
    """Whole or not at all."""
    from safetensors.torch import save_file

    sizes = torch.tensor([[text.prompt, len(text.tokens)] for text in texts], dtype=torch.int64)
    found = {"sizes": sizes.view(-1, 2)}
    if texts:
        found["tokens"] = torch.cat([text.tokens.int() for text in texts])
        found["hidden"] = torch.cat([text.hidden.bfloat16() for text in texts])
        found["ids"] = torch.cat([text.ids.int() for text in texts])
        found["log_probabilities"] = torch.cat([text.log_probabilities.half() for text in texts])
    with replacing(path) as temporary:
        save_file(found, str(temporary))


class Shelf:
    """Texts of several files, read one at a time. Raises UnreadableModel where a file is none of texts."""

    def __init__(self, files: Iterable[Path], device: torch.device | str = "cpu") -> None:
        self._files, self._device = tuple(files), torch.device(device)
        self._counts: Sequence[Tensor] | None = None
        self._places: list[tuple[Path, int, Tensor]] = []  # file, number in it, sizes of the file's texts
        for file in self._files:
            sizes = _part(file, "sizes")
            self._places += [(file, number, sizes) for number in range(len(sizes))]

    def __len__(self) -> int:
        return len(self._places)

    def counted(self, counts: Sequence[Tensor]) -> Shelf:
        """The same texts, whose roots count so much [R] each."""
        found = Shelf(self._files, self._device)
        found._counts = counts
        return found

    def longest(self) -> int:
        """Tokens of the longest text."""
        return max((int(sizes[number, 1]) for _, number, sizes in self._places), default=0)

    def read(self, index: int) -> WrittenText:
        file, number, sizes = self._places[index]
        before, (prompt, length) = sizes[:number], sizes[number].tolist()
        token, row = int(before[:, 1].sum()), int((before[:, 1] - 1).sum())
        root, roots = int(_roots(before).sum()), length - 1 - prompt
        return WrittenText(
            _part(file, "tokens", token, length).to(self._device).long(),
            prompt,
            _part(file, "hidden", row, length - 1).to(self._device).float(),
            _part(file, "ids", root, roots).to(self._device).long(),
            _part(file, "log_probabilities", root, roots).to(self._device).float(),
            None if self._counts is None else self._counts[index].to(self._device),
        )

    def answers(self) -> Iterator[Tensor]:
        """Tokens [n] int64 behind each prompt, without the rest of the texts."""
        for file, number, sizes in self._places:
            prompt, length = sizes[number].tolist()
            yield _part(file, "tokens", int(sizes[:number, 1].sum()) + prompt, length - prompt).long()


def _roots(sizes: Tensor) -> Tensor:
    return sizes[:, 1] - 1 - sizes[:, 0]


def _part(file: Path, name: str, first: int = 0, count: int | None = None) -> Tensor:
    """Rows of a tensor in a file, and nothing else of it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            part = opened.get_slice(name)
            found: Tensor = part[first:] if count is None else part[first : first + count]
            return found
    except (OSError, SafetensorError) as error:
        problem, fix = f"{type(error).__name__}: {error}", "Delete it: it is written again."
        raise UnreadableModel(name=str(file), problem=problem, expected="a file of texts", fix=fix) from error
