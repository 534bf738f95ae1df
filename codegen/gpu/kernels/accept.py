"""Greedy acceptance: the largest logit of every row, then a walk by parents."""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl

# As int32 keys, see `ordered`.
NAN: tl.constexpr = tl.constexpr(0x7FFFFFFF)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
MINUS_INFINITY: tl.constexpr = tl.constexpr(-0x7F800001)
LOWEST: tl.constexpr = tl.constexpr(-(2**63))  # below every key: nothing was read
LAST_ID: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit
def ordered(x):
    """float32 to int32 with the same order: -0 = 0, and NaN above all others."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    # negative numbers: the larger the magnitude, the smaller the key
    return tl.where(x != x, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def unordered(key):
    """The float32 of a key; NAN gives a NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(x, ids):
    """int64, larger for larger x and, where x is the same, for the lower id; distinct for distinct ids."""
    return (ordered(x).to(tl.int64) << 32) | (LAST_ID - ids.to(tl.int64))


@triton.jit
def row_best_kernel(logits, row_stride, id_stride, best, V, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, s): the two largest of ids s * SPLIT .. of row i, ranked, to best [rows, splits, 2]."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.full([BLOCK], LOWEST, tl.int64)
    second = tl.full([BLOCK], LOWEST, tl.int64)
    for start in range(0, SPLIT, BLOCK):
        ids = split * SPLIT + start + tl.arange(0, BLOCK)
        live = ids < V
        x = tl.load(logits + row * row_stride + ids.to(tl.int64) * id_stride, mask=live, other=0.0).to(tl.float32)
        new = tl.where(live, ranked(x, ids), LOWEST)
        second = tl.maximum(second, tl.minimum(first, new))
        first = tl.maximum(first, new)
    top = tl.max(first, 0)
    place = best + (row * tl.num_programs(1) + split) * 2
    tl.store(place, top)
    tl.store(place + 1, tl.max(tl.where(first == top, second, first), 0))


# NOTE lists of a step lie one after the other: where they begin must not select a compilation.
@triton.jit(
    do_not_specialize=["requests", "splits"],
    do_not_specialize_on_alignment=["tokens", "parents", "node_offsets", "out"],
)
def greedy_walk_kernel(
    best, tokens, parents, node_offsets, out, requests, splits, TIE: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program r: request r's path, from the ranked logits of its rows."""
    r = tl.program_id(0)
    begin, end = tl.load(node_offsets + r), tl.load(node_offsets + r + 1)
    nodes = (end - begin).to(tl.int32)
    node = tl.arange(0, BLOCK_N)
    live = node < nodes
    column = tl.arange(0, BLOCK_S)
    place = best + ((begin + node)[:, None] * splits + column[None, :]) * 2
    there = live[:, None] & (column < splits)[None, :]
    firsts = tl.load(place, mask=there, other=LOWEST)
    top = tl.max(firsts, 1)
    key = (top >> 32).to(tl.int32)
    choice = LAST_ID - (top & LAST_ID)
    unusable = (key >= INFINITY) | (key <= MINUS_INFINITY)
    near = tl.zeros([BLOCK_N], tl.int1)
    if TIE > 0.0:
        seconds = tl.load(place + 1, mask=there, other=LOWEST)
        next_key = (tl.max(tl.where(firsts == top[:, None], seconds, firsts), 1) >> 32).to(tl.int32)
        a, b = unordered(key), unordered(next_key)
        # NOTE: LOWEST, of a vocabulary of one, decodes to a NaN and is caught by the comparison of keys
        finite = (unusable == 0) & (next_key > MINUS_INFINITY)
        near = finite & (a - b <= TIE * tl.maximum(tl.abs(a), tl.abs(b)))

    token = tl.load(tokens + begin + node, mask=live, other=-1)
    parent = tl.load(parents + begin + node, mask=live, other=-1).to(tl.int32)
    depth = tl.where(live & (node == 0), 0, -1)  # place in the path
    length = tl.minimum(nodes, 1)
    last = 0
    want = tl.sum(tl.where(node == 0, choice, 0), 0)
    going = nodes > 1
    while going:
        fits = live & (node > 0) & (parent == last) & (token == want)
        child = tl.min(tl.where(fits, node, BLOCK_N), 0)
        going = child < BLOCK_N
        if going:
            depth = tl.where(node == child, length, depth)
            length += 1
            last = child
            want = tl.sum(tl.where(node == child, choice, 0), 0)

    on_path = depth >= 0
    wrong = tl.min(tl.where(on_path & unusable, depth, BLOCK_N), 0)
    mine = out + r * FIELDS
    tl.store(mine, length.to(tl.int64))
    tl.store(mine + 1, tl.where(nodes > 0, want, -1))
    tl.store(mine + 2, tl.where(wrong < BLOCK_N, wrong, -1).to(tl.int64))
    tl.store(mine + 3, tl.max((on_path & near).to(tl.int32), 0).to(tl.int64))
    path = out + requests * FIELDS + begin
    tl.store(path + node, tl.full([BLOCK_N], -1, tl.int64), mask=live & (node >= length))
    tl.store(path + depth, node.to(tl.int64), mask=on_path)
