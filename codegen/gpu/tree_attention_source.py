"""Generates the Triton source of tree attention for one `AttentionKernel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from textwrap import indent
from typing import Any

import torch

from treespec_compiler.ir import formulas

from ..printer import HELPERS, TRITON, Printer
from .tree_attention_spec import AttentionKernel, Piece
from .tree_attention_template import (
    ATTEND,
    DENSE_PREFIX,
    HEAD,
    MASKED_PREFIX,
    MERGE,
    MERGE_SINK,
    ONES,
    RANK,
    SINK,
    WORDS,
)

# Of a chain, keys below the window can be skipped; in a tree, depth and place differ.
TREE_BEGIN = "(begin - tl.minimum(begin, prefix)) // 64 * 64 if CHAIN else 0"
DISTANCE_TABLE = "tl.load(bias + {head} * distances + tl.maximum({distance}, 0)).to(tl.float32)"


@functools.lru_cache(256)
def source(spec: AttentionKernel) -> str:
    """The text of a module with two kernels: `attend`, and `merge` for when `attend` shares the keys out."""
    score, score_helpers = _score(spec)
    text = HEAD.format(
        heads=spec.heads,
        group=spec.group,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        mask=spec.mask.formula,
        score=formulas.score(spec.softcap, spec.slopes, spec.bias),
        helpers="".join(f"\n\n{HELPERS[name]}" for name in sorted(score_helpers)),
    )
    if _needs_distance(spec):
        text += ONES
    text += ATTEND.format(
        tables=_tables(spec),
        load_q=_lines(_load_q(spec, i, p) for i, p in enumerate(spec.key_pieces)),
        load_tables=_load_tables(spec),
        begin=_begin(spec),
        tree_begin="0" if _is_dense(spec) else TREE_BEGIN,
        dims=_dims(spec),
        sums=_lines(f"acc{i} = tl.zeros([BLOCK_M, {p.size}], tl.float32)" for i, p in enumerate(spec.value_pieces)),
        prefix=_prefix(spec, score),
        path_length="\n    length = q_pos - prefix + 1  # nodes of the path, itself included" * _needs_distance(spec),
        unit="LOG2E" if spec.scored else "scale * LOG2E",
        passed="\n    passed = tl.zeros([BLOCK_M], tl.int32)  # of these, in earlier words" * _needs_distance(spec),
        tree=indent(_tile(spec, score, "tree"), " " * 8),
        store_part=indent(_store(spec, "part"), " " * 8),
        sink=SINK * spec.sinks,
        store_out=indent(_store(spec, "row"), " " * 4),
        store_zeros=_lines(
            (f"tl.store({_place('stray', i, p)}, tl.zeros([BLOCK_M, {p.size}], out.dtype.element_ty), mask={m})"
             for i, p, m in _value_masks(spec, "nobodys[:, None]")), 8
        ),
    )  # fmt: skip
    return text + MERGE.format(
        sinks="\n    sinks," * spec.sinks,
        sink=MERGE_SINK * spec.sinks,
        block=1 << (spec.value_dim - 1).bit_length(),
    )


def _lines(lines: Iterable[str], spaces: int = 4) -> str:
    return "".join(f"\n{' ' * spaces}{line}" for line in lines)


def _where(*conditions: str) -> str:
    """The mask argument of a load."""
    given = [c for c in conditions if c]
    return f", mask={' & '.join(given)}, other=0.0" if given else ""


# -- what the spec says, in code ------------------------------------------------------------------------------------


def _printer(spec: AttentionKernel, key: str) -> Printer:
    """`key`: the code of a key's position. Distances and scores are tiles [BLOCK_M, keys]."""
    names = {"s": "s", "q": "q_pos[:, None]", "k": key, "d": "distance", "h": "head[:, None]"}
    tables: dict[str, Callable[..., str]] = {
        "slopes": lambda head: "slope[:, None]",
        "bias": lambda head, distance: DISTANCE_TABLE.format(head=head, distance=distance),
    }
    return Printer(TRITON, names, tables)


def _score(spec: AttentionKernel) -> tuple[str, set[str]]:
    printer = _printer(spec, "")
    return printer.doprint(formulas.score(spec.softcap, spec.slopes, spec.bias)), printer.helpers


def _beyond_causal(spec: AttentionKernel) -> Any:
    """The predicate on keys of a query's own path, in positions and distances."""
    return formulas.by_distance(formulas.without_causal(formulas.predicate(spec.mask)))


def _is_dense(spec: AttentionKernel) -> bool:
    """Whether every committed token is seen."""
    return _beyond_causal(spec) == True  # noqa: E712  (sympy's true)


def _needs_distance(spec: AttentionKernel) -> bool:
    return not _is_dense(spec) or spec.slopes or spec.bias


# -- pieces of the kernel -------------------------------------------------------------------------------------------


def _tables(spec: AttentionKernel) -> str:
    names = [name for name in ("slopes", "bias", "sinks") if getattr(spec, name)]
    return "".join(f"\n    {name}," for name in names) + "\n    distances," * spec.bias


def _load_q(spec: AttentionKernel, i: int, piece: Piece) -> str:
    mask = _where("alive[:, None]", f"(d{i} < {spec.key_dim})[None, :]" if piece.valid < piece.size else "")
    return f"q{i} = tl.load(q + (head * q_head + node * q_node)[:, None] + d{i}[None, :]{mask})"


def _load_tables(spec: AttentionKernel) -> str:
    out = []
    if _needs_distance(spec):
        out.append("q_pos = tl.load(positions + node, mask=alive, other=0).to(tl.int32)")
    if spec.slopes:
        out.append("slope = tl.load(slopes + head).to(tl.float32)")
    return _lines(out)


def _begin(spec: AttentionKernel) -> str:
    if _is_dense(spec):
        return "\n    begin = 0"
    bounds = []
    if spec.mask.window:
        bounds.append(f"lowest - {spec.mask.window - 1}")
    if spec.mask.chunk:
        bounds.append(f"lowest // {spec.mask.chunk} * {spec.mask.chunk}")
    lines = ["lowest = tl.min(tl.where(alive, q_pos, 2147483647), 0)  # farther back no row sees a key", "begin = 0"]
    return _lines(lines + [f"begin = tl.maximum(begin, {bound})" for bound in bounds])


def _dims(spec: AttentionKernel) -> str:
    named = [("d", i, p) for i, p in enumerate(spec.key_pieces)] + [
        ("e", i, p) for i, p in enumerate(spec.value_pieces)
    ]
    return _lines(f"{name}{i} = {f'{p.start} + ' * bool(p.start)}tl.arange(0, {p.size})" for name, i, p in named)


def _prefix(spec: AttentionKernel, score: str) -> str:
    if _is_dense(spec):
        return DENSE_PREFIX.format(
            full=indent(_tile(spec, score, "full"), " " * 8),
            tail_head="for start in range(whole, end, BLOCK_N):" if _tail_is_loop(spec) else "if whole < end:",
            tail=indent(_tile(spec, score, "tail"), " " * 8),
        )
    return MASKED_PREFIX.format(tile=indent(_tile(spec, score, "masked"), " " * 8))


def _tail_is_loop(spec: AttentionKernel) -> bool:
    """Whether the block behind the whole ones is a loop, though it runs once at most.

    A loop's loads go through shared memory, others into registers: float32 products need the registers, and those of
    tensor cores are spared a third pipeline.
    """
    return spec.dtype == torch.float32


def _tile(spec: AttentionKernel, score: str, part: str) -> str:
    """One block of keys: load K, scores, weights, load V. `part`: full | tail | masked (committed), tree."""
    tree = part == "tree"
    inside = "" if part == "full" else "inside"
    token, width = ("prefix + j", "TREE_N") if tree else ("n", "BLOCK_N")
    name = "j" if tree else "n"
    out = [f"{name} = {'whole' if part == 'tail' and not _tail_is_loop(spec) else 'start'} + tl.arange(0, {width})"]
    if inside:
        out.append(f"inside = {name} < {'tree_end' if tree else 'end'}")
    page_mask = inside or f"{name} >= 0"
    out.append(f"k_at = places({token}, {page_mask}, table, page_size, k_page, k_token, ONE_PAGE)")
    out += [f"k{i} = {_load_k(spec, i, p, inside)}" for i, p in enumerate(spec.key_pieces)]
    precise = ', input_precision="ieee"' if spec.dtype == torch.float32 else ""
    out.append(f"s = tl.dot(q0, {_cast('k0', 'q0', spec)}{precise})")
    out += [f"s = tl.dot(q{i}, {_cast(f'k{i}', 'q0', spec)}, s{precise})" for i in range(1, len(spec.key_pieces))]
    out += _seen(spec, part)
    if spec.scored:
        out += ["s = s * scale", f"s = {score}"]
    if part != "full":
        out.append('s = tl.where(seen, s, float("-inf"))')
    out.append(f"p, rescale, top, total = online_softmax(s, unit, top, total, {part in ('masked', 'tree')})")
    out.append(f"v_at = places({token}, {page_mask}, table, page_size, v_page, v_token, ONE_PAGE)")
    for i, piece in enumerate(spec.value_pieces):
        out.append(f"v{i} = {_load_v(spec, i, piece, inside)}")
        out.append(f"acc{i} = tl.dot(p.to(q0.dtype), {_cast(f'v{i}', 'q0', spec)}, acc{i} * rescale[:, None]{precise})")
    if tree and _needs_distance(spec):
        out += ["if not CHAIN:", "    passed += ones(low)", "    if TREE_N == 64:", "        passed += ones(high)"]
    return "\n".join(out)


def _cast(name: str, like: str, spec: AttentionKernel) -> str:
    return name if spec.dtype == spec.pool_dtype else f"{name}.to({like}.dtype)"


def _seen(spec: AttentionKernel, part: str) -> list[str]:
    """Code that sets `seen` and, where the spec needs it, `distance`."""
    out: list[str] = []
    if part == "tree":
        out += _of_a_tree(spec)
    elif _needs_distance(spec):
        out.append("distance = q_pos[:, None] - n[None, :]")
    key = "(q_pos[:, None] - distance)" if part == "tree" else "n[None, :]"
    beyond = "" if _is_dense(spec) else _printer(spec, key).doprint(_beyond_causal(spec))
    if part == "tree":
        if beyond:
            out.append(f"seen = seen & ({beyond})")
    elif part == "masked":
        out.append(f"seen = inside[None, :] & ({beyond})")
    elif part == "tail":
        out.append("seen = inside[None, :]")
    return out


def _of_a_tree(spec: AttentionKernel) -> list[str]:
    """Which nodes are ancestors, and how far up they are."""
    chain = ["seen = j[None, :] <= own[:, None]"]
    tree = WORDS.splitlines()
    if _needs_distance(spec):
        chain.append("distance = own[:, None] - j[None, :]")
        tree += RANK.splitlines()
    tree.append("seen = ((word >> bit[None, :]) & 1) != 0")
    return ["if CHAIN:", *(f"    {line}" for line in chain), "else:", *(f"    {line}" for line in tree)]


def _load_k(spec: AttentionKernel, i: int, piece: Piece, inside: str) -> str:
    padded = f"(d{i} < {spec.key_dim})[:, None]" if piece.valid < piece.size else ""
    return f"tl.load(keys + k_at[None, :] + d{i}[:, None]{_where(inside and f'{inside}[None, :]', padded)})"


def _load_v(spec: AttentionKernel, i: int, piece: Piece, inside: str) -> str:
    padded = f"(e{i} < {spec.value_dim})[None, :]" if piece.valid < piece.size else ""
    return f"tl.load(values + v_at[:, None] + e{i}[None, :]{_where(inside and f'{inside}[:, None]', padded)})"


def _value_masks(spec: AttentionKernel, rows: str) -> list[tuple[int, Piece, str]]:
    padded = f" & (e{{}} < {spec.value_dim})[None, :]"
    return [(i, p, rows + (padded.format(i) if p.valid < p.size else "")) for i, p in enumerate(spec.value_pieces)]


def _place(row: str, i: int, piece: Piece) -> str:
    return f"out + ({row} * VALUE)[:, None] + e{i}[None, :]"


def _store(spec: AttentionKernel, row: str) -> str:
    return "inverse = 1.0 / total\n" + "\n".join(
        f"tl.store({_place(row, i, p)}, (acc{i} * inverse[:, None]).to(out.dtype.element_ty), mask={mask})"
        for i, p, mask in _value_masks(spec, "alive[:, None]")
    )
