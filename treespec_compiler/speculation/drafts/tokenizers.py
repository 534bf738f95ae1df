"""Do draft and target mean the same token by an id?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import TokenizerMismatch


def check_tokenizers(target: Any, draft: Any) -> None:
    """Raise `TokenizerMismatch` unless every id that both tokenizers know is the same token.

    Takes Hugging Face tokenizers (`get_vocab()`) or mappings token -> id; None means unknown and is not compared.
    """
    if target is None or draft is None or target is draft:
        return
    target_vocab, draft_vocab = _vocab(target), _vocab(draft)
    if target_vocab == draft_vocab:
        return
    target_token = {i: token for token, i in target_vocab.items()}
    draft_token = {i: token for token, i in draft_vocab.items()}
    shared = sorted(target_token.keys() & draft_token.keys())
    if not shared:
        raise TokenizerMismatch(difference="vocabularies without a common id")
    differing = [i for i in shared if target_token[i] != draft_token[i]]
    if differing:
        i = differing[0]
        raise TokenizerMismatch(
            difference=f"id {i} = {target_token[i]!r} in the target and {draft_token[i]!r} in the draft "
            f"({len(differing)} of {len(shared)} common ids differ)"
        )


def _vocab(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer.get_vocab()
