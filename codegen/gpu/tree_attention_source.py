"""Generates the Triton source of tree attention for one `AttentionKernel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from textwrap import indent
from typing import Any

import torch

from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, Piece, pieces
from treespec_compiler.codegen.printer import HELPERS, TRITON, Printer
from treespec_compiler.ir import formulas

DISTANCE_TABLE = "tl.load(bias + {head} * distances + tl.maximum({distance}, 0)).to(tl.float32)"


@functools.lru_cache(256)
def source(spec: AttentionKernel) -> str:
    """The text of a module with two kernels: `attend`, and `merge` for when `attend` shares the keys out."""
    score, score_helpers = _score(spec)
    text = _HEAD.format(
        heads=spec.heads,
        group=spec.group,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        mask=spec.mask.formula,
        score=formulas.score(spec.softcap, spec.slopes, spec.bias),
        helpers="".join(f"\n\n{HELPERS[name]}" for name in sorted(score_helpers)),
    )
    if _needs_distance(spec):
        text += _ONES
    text += _ATTEND.format(
        tables=_tables(spec),
        load_q=_lines(_load_q(spec, i, p) for i, p in enumerate(_key(spec))),
        load_tables=_load_tables(spec),
        begin=_begin(spec),
        dims=_dims(spec),
        sums=_lines(f"acc{i} = tl.zeros([BLOCK_M, {p.size}], tl.float32)" for i, p in enumerate(_value(spec))),
        prefix=_prefix(spec, score),
        path_length="\n    length = q_pos - prefix + 1  # nodes of the path, itself included" * _needs_distance(spec),
        unit="LOG2E" if spec.scored else "scale * LOG2E",
        passed="\n    passed = tl.zeros([BLOCK_M], tl.int32)  # of these, in earlier words" * _needs_distance(spec),
        tree=indent(_tile(spec, score, "tree"), " " * 8),
        store_part=indent(_store(spec, "part"), " " * 8),
        sink=_SINK * spec.sinks,
        store_out=indent(_store(spec, "row"), " " * 4),
        store_zeros=_lines(
            (f"tl.store({_place('stray', i, p)}, tl.zeros([BLOCK_M, {p.size}], out.dtype.element_ty), mask={m})"
             for i, p, m in _value_masks(spec, "nobodys[:, None]")), 8
        ),
    )  # fmt: skip
    return text + _MERGE.format(
        sinks="\n    sinks," * spec.sinks,
        sink=_MERGE_SINK * spec.sinks,
        block=1 << (spec.value_dim - 1).bit_length(),
    )


def _lines(lines: Iterable[str], spaces: int = 4) -> str:
    return "".join(f"\n{' ' * spaces}{line}" for line in lines)


def _key(spec: AttentionKernel) -> tuple[Piece, ...]:
    return pieces(spec.key_dim, spec.largest_piece)


def _value(spec: AttentionKernel) -> tuple[Piece, ...]:
    return pieces(spec.value_dim, spec.largest_piece)


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
    named = [("d", i, p) for i, p in enumerate(_key(spec))] + [("e", i, p) for i, p in enumerate(_value(spec))]
    return _lines(f"{name}{i} = {f'{p.start} + ' * bool(p.start)}tl.arange(0, {p.size})" for name, i, p in named)


def _prefix(spec: AttentionKernel, score: str) -> str:
    if _is_dense(spec):
        return _DENSE_PREFIX.format(
            full=indent(_tile(spec, score, "full"), " " * 8),
            tail_head="for start in range(whole, end, BLOCK_N):" if _tail_is_loop(spec) else "if whole < end:",
            tail=indent(_tile(spec, score, "tail"), " " * 8),
        )
    return _MASKED_PREFIX.format(tile=indent(_tile(spec, score, "masked"), " " * 8))


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
    out += [f"k{i} = {_load_k(spec, i, p, inside)}" for i, p in enumerate(_key(spec))]
    precise = ', input_precision="ieee"' if spec.dtype == torch.float32 else ""
    out.append(f"s = tl.dot(q0, {_cast('k0', 'q0', spec)}{precise})")
    out += [f"s = tl.dot(q{i}, {_cast(f'k{i}', 'q0', spec)}, s{precise})" for i in range(1, len(_key(spec)))]
    out += _seen(spec, part)
    if spec.scored:
        out += ["s = s * scale", f"s = {score}"]
    if part != "full":
        out.append('s = tl.where(seen, s, float("-inf"))')
    out.append(f"p, kept, top, total = soften(s, unit, top, total, {part in ('masked', 'tree')})")
    out.append(f"v_at = places({token}, {page_mask}, table, page_size, v_page, v_token, ONE_PAGE)")
    for i, piece in enumerate(_value(spec)):
        out.append(f"v{i} = {_load_v(spec, i, piece, inside)}")
        out.append(f"acc{i} = tl.dot(p.to(q0.dtype), {_cast(f'v{i}', 'q0', spec)}, acc{i} * kept[:, None]{precise})")
    if tree and _needs_distance(spec):
        out += ["passed += ones(low)", "if TREE_N == 64:", "    passed += ones(high)"]
    return "\n".join(out)


def _cast(name: str, like: str, spec: AttentionKernel) -> str:
    return name if spec.dtype == spec.pool_dtype else f"{name}.to({like}.dtype)"


def _seen(spec: AttentionKernel, part: str) -> list[str]:
    """Code that sets `seen` and, where the spec needs it, `distance`."""
    out: list[str] = []
    if part == "tree":
        out += _WORDS.splitlines()
        if _needs_distance(spec):
            out += _RANK.splitlines()
    elif _needs_distance(spec):
        out.append("distance = q_pos[:, None] - n[None, :]")
    key = "(q_pos[:, None] - distance)" if part == "tree" else "n[None, :]"
    beyond = "" if _is_dense(spec) else _printer(spec, key).doprint(_beyond_causal(spec))
    if part == "tree":
        out.append("seen = ((word >> bit[None, :]) & 1) != 0")
        if beyond:
            out.append(f"seen = seen & ({beyond})")
    elif part == "masked":
        out.append(f"seen = inside[None, :] & ({beyond})")
    elif part == "tail":
        out.append("seen = inside[None, :]")
    return out


def _load_k(spec: AttentionKernel, i: int, piece: Piece, inside: str) -> str:
    padded = f"(d{i} < {spec.key_dim})[:, None]" if piece.valid < piece.size else ""
    return f"tl.load(keys + k_at[None, :] + d{i}[:, None]{_where(inside and f'{inside}[None, :]', padded)})"


def _load_v(spec: AttentionKernel, i: int, piece: Piece, inside: str) -> str:
    padded = f"(e{i} < {spec.value_dim})[None, :]" if piece.valid < piece.size else ""
    return f"tl.load(values + v_at[:, None] + e{i}[None, :]{_where(inside and f'{inside}[:, None]', padded)})"


def _value_masks(spec: AttentionKernel, rows: str) -> list[tuple[int, Piece, str]]:
    padded = f" & (e{{}} < {spec.value_dim})[None, :]"
    return [(i, p, rows + (padded.format(i) if p.valid < p.size else "")) for i, p in enumerate(_value(spec))]


def _place(row: str, i: int, piece: Piece) -> str:
    return f"out + ({row} * VALUE)[:, None] + e{i}[None, :]"


def _store(spec: AttentionKernel, row: str) -> str:
    return "inverse = 1.0 / total\n" + "\n".join(
        f"tl.store({_place(row, i, p)}, (acc{i} * inverse[:, None]).to(out.dtype.element_ty), mask={mask})"
        for i, p, mask in _value_masks(spec, "alive[:, None]")
    )


# -- text -----------------------------------------------------------------------------------------------------------

_HEAD = '''"""Tree attention: new nodes of several requests attend to committed tokens and to their own ancestors.

A row is a node and one of the GROUP query heads that share a key head; a program takes BLOCK_M rows of one request,
one key head, and (SPLIT) a share of the committed tokens or the tree. Scores are in powers of two.

mask:  {mask}
score: {score}
"""

import triton
import triton.language as tl

HEADS = tl.constexpr({heads})
GROUP = tl.constexpr({group})
KEY = tl.constexpr({key_dim})
VALUE = tl.constexpr({value_dim})
LOG2E = tl.constexpr(1.4426950408889634)
{helpers}

@triton.jit
def places(n, inside, table, page_size, page_stride, token_stride, ONE_PAGE: tl.constexpr):
    """Where tokens n of a slot lie in a pool; with one page, from the page's start."""
    if ONE_PAGE:
        at = n * token_stride
    else:
        page = tl.load(table + n // page_size, mask=inside, other=0)
        at = page * page_stride + (n % page_size) * token_stride
    return at


@triton.jit
def soften(s, unit, top, total, MAY_BE_EMPTY: tl.constexpr):
    """Softmax so far: the weights of scores s, what earlier sums must be multiplied by, the new maximum and sum.

    `unit`, above 0, turns scores into powers of two; multiplied here, it is a part of the subtraction.
    """
    best = tl.maximum(top, tl.max(s, 1) * unit)
    base = best
    if MAY_BE_EMPTY:
        base = tl.where(best == float("-inf"), 0.0, best)  # a row that has seen no key yet
    p = tl.exp2(s * unit - base[:, None])
    kept = tl.exp2(top - base)
    return p, kept, best, total * kept + tl.sum(p, 1)
'''

_ONES = '''

@triton.jit
def ones(x):
    """How many of 32 bits are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
'''

_ATTEND = """

# NOTE sizes that change from step to step, and addresses within one block of metadata, must not select a compilation.
@triton.jit(
    do_not_specialize=["nodes", "requests", "splits", "words", "pages"],
    do_not_specialize_on_alignment=["positions", "node_offsets", "page_table", "prefix_lens", "tree_lens", "ancestors"],
)
def attend(
    q,  # [Hq, T, KEY]
    pool_k,  # [pages, Hkv, page_size, KEY]
    pool_v,  # [pages, Hkv, page_size, VALUE]
    out,  # [T, HEADS, VALUE]; SPLIT: [splits + 1, T, HEADS, VALUE] float32
    tops,  # SPLIT: [splits + 1, T, HEADS] float32, the log2 of the sum behind each part
    positions,
    node_offsets,
    page_table,
    prefix_lens,
    tree_lens,
    ancestors,  # [T, words] int32{tables}
    scale,
    nodes,
    requests,
    splits,
    words,
    pages,
    page_size,
    q_head,
    q_node,
    k_page,
    k_head,
    k_token,
    v_page,
    v_head,
    v_token,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REQUESTS: tl.constexpr,  # a power of two, at least `requests`
    ONE_PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Later nodes see more: in a long prompt, programs with much to do start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split = tl.program_id(1), tl.program_id(2){dims}

    # Rows of no request give 0; with SPLIT, `merge` writes them.
    if not SPLIT:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        node = m // GROUP
        nobodys = (node < nodes) & ((node < tl.load(node_offsets)) | (node >= tl.load(node_offsets + requests)))
        stray = node.to(tl.int64) * HEADS + kv_head * GROUP + m % GROUP{store_zeros}

    # Which request this block of rows belongs to, and which of its blocks it is.
    request = 0
    if REQUESTS > 1:
        r = tl.arange(0, REQUESTS)
        first = tl.load(node_offsets + r, mask=r < requests, other=0)
        last = tl.load(node_offsets + r + 1, mask=r < requests, other=0)
        blocks = tl.cdiv(((last - first) * GROUP).to(tl.int32), BLOCK_M)
        request = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
        block -= tl.sum(tl.where(r < request, blocks, 0), 0)
        if request >= requests:
            return
    first_node = tl.load(node_offsets + request)
    new = (tl.load(node_offsets + request + 1) - first_node).to(tl.int32)
    if block * BLOCK_M >= new * GROUP:
        return
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    tree = tl.load(tree_lens + request).to(tl.int32)

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = m < new * GROUP
    node = first_node + m // GROUP
    head = kv_head * GROUP + m % GROUP{load_q}{load_tables}

    # The committed tokens and tree nodes this program reads. Nodes come after their ancestors.{begin}
    end = prefix
    tree_end = tl.minimum(tree, tree - new + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    if SPLIT:
        # The last program reads the tree: its share of the committed tokens begins at their end.
        share = tl.cdiv(tl.cdiv(tl.maximum(prefix - begin, 0), splits), BLOCK_N) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(begin + share, prefix)
        tree_end = tl.where(split < splits, 0, tree_end)
        if (split < splits) & (begin >= end):
            empty = (split * nodes + node) * HEADS + head
            tl.store(tops + empty, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=alive)
            return

    table = page_table + request * pages
    keys = pool_k + kv_head.to(tl.int64) * k_head
    values = pool_v + kv_head.to(tl.int64) * v_head
    if ONE_PAGE:
        page = tl.load(table)
        keys += page * k_page
        values += page * v_page
    unit = {unit}
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32){sums}
{prefix}
    # The tree: node j lies right behind the committed tokens, and is seen where its bit is set.
    TREE_N: tl.constexpr = 64 if BLOCK_N >= 64 else 32
    line = ancestors + node * words{path_length}{passed}
    for start in range(0, tree_end, TREE_N):
{tree}

    row = node * HEADS + head
    if SPLIT:
        part = split * nodes.to(tl.int64) * HEADS + row
        tl.store(tops + part, top + tl.log2(total), mask=alive)
{store_part}
        return
{sink}{store_out}
"""

_DENSE_PREFIX = """
    # Committed tokens, all of them seen: whole blocks, then the rest.
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    for start in range(begin, whole, BLOCK_N):
{full}
    {tail_head}
{tail}
"""

_MASKED_PREFIX = """
    # Committed tokens.
    for start in range(begin, end, BLOCK_N):
{tile}
"""

_WORDS = """low = tl.load(line + start // 32, mask=alive, other=0)
bit = j % 32
if TREE_N == 64:
    high = tl.load(line + start // 32 + 1, mask=alive, other=0)
    word = tl.where((j % 64 < 32)[None, :], low[:, None], high[:, None])
else:
    word = low[:, None]"""

_RANK = """rank = passed[:, None] + ones(word << (31 - bit)[None, :])  # nodes of the path down to j
if TREE_N == 64:
    rank += tl.where((j % 64 < 32)[None, :], 0, ones(low)[:, None])
distance = length[:, None] - rank"""

_SINK = """
    # The weight of a key that has no value.
    total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - top)
"""

_MERGE = '''

@triton.jit(do_not_specialize=["requests", "rows", "parts"], do_not_specialize_on_alignment=["node_offsets"])
def merge(
    partial,  # [parts, rows, VALUE] float32
    tops,  # [parts, rows] float32
    out,  # [rows, VALUE]
    node_offsets,{sinks}
    requests,
    rows,
    parts,
    PARTS: tl.constexpr,  # a power of two, at least `parts`
):
    """Program i: the parts of row i, each weighted with the sum behind it. A part that saw no key has a top of -inf."""
    row = tl.program_id(0).to(tl.int64)
    node = row // HEADS
    owned = (node >= tl.load(node_offsets)) & (node < tl.load(node_offsets + requests))
    part = tl.arange(0, PARTS)
    top = tl.load(tops + part * rows + row, mask=part < tl.where(owned, parts, 0), other=float("-inf"))
    best = tl.where(owned, tl.max(top, 0), 0.0)
    weight = tl.exp2(top - best)
    total = tl.sum(weight, 0){sink}
    e = tl.arange(0, {block})
    some = (top > float("-inf"))[:, None] & (e < VALUE)[None, :]
    x = tl.load(partial + (part * rows + row)[:, None] * VALUE + e[None, :], mask=some, other=0.0)
    mean = tl.sum(x * weight[:, None], 0) * (1.0 / total)
    tl.store(out + row * VALUE + e, tl.where(owned, mean, 0.0).to(out.dtype.element_ty), mask=e < VALUE)
'''

_MERGE_SINK = """
    total += tl.exp2(tl.load(sinks + row % HEADS).to(tl.float32) * LOG2E - best)"""
