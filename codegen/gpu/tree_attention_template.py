"""The text that tree attention's source is made of; `tree_attention_source` fills it in."""

HEAD = '''"""Tree attention: new nodes of several requests attend to committed tokens and to their own ancestors.

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
def online_softmax(s, unit, top, total, MAY_BE_EMPTY: tl.constexpr):
    """Online softmax: the weights of scores s, what earlier sums must be multiplied by, the new maximum and sum.

    `unit`, above 0, turns scores into powers of two; multiplied here, it is a part of the subtraction.
    """
    best = tl.maximum(top, tl.max(s, 1) * unit)
    base = best
    if MAY_BE_EMPTY:
        base = tl.where(best == float("-inf"), 0.0, best)  # a row that has seen no key yet
    p = tl.exp2(s * unit - base[:, None])
    rescale = tl.exp2(top - base)
    return p, rescale, best, total * rescale + tl.sum(p, 1)
'''

ONES = '''

@triton.jit
def ones(x):
    """How many of 32 bits are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
'''

ATTEND = """

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
    lse,  # SPLIT: [splits + 1, T, HEADS] float32, log2-sum-exp of each part's scores
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
    CHAIN: tl.constexpr,  # every request's nodes are a chain: there are no ancestor words
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
    tree_begin = {tree_begin}
    tree_end = tl.minimum(tree, tree - new + (block * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    if SPLIT:
        # The last program reads the tree: its share of the committed tokens begins at their end.
        share = tl.cdiv(tl.cdiv(tl.maximum(prefix - begin, 0), splits), BLOCK_N) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(begin + share, prefix)
        tree_end = tl.where(split < splits, 0, tree_end)
        if (split < splits) & (begin >= end):
            empty = (split * nodes + node) * HEADS + head
            tl.store(lse + empty, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=alive)
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
    own = tree - new + m // GROUP
    line = ancestors + node * words{path_length}{passed}
    for start in range(tree_begin, tree_end, TREE_N):
{tree}

    row = node * HEADS + head
    if SPLIT:
        part = split * nodes.to(tl.int64) * HEADS + row
        tl.store(lse + part, top + tl.log2(total), mask=alive)
{store_part}
        return
{sink}{store_out}
"""

DENSE_PREFIX = """
    # Committed tokens, all of them seen: whole blocks, then the rest.
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    for start in range(begin, whole, BLOCK_N):
{full}
    {tail_head}
{tail}
"""

MASKED_PREFIX = """
    # Committed tokens.
    for start in range(begin, end, BLOCK_N):
{tile}
"""

WORDS = """low = tl.load(line + start // 32, mask=alive, other=0)
bit = j % 32
if TREE_N == 64:
    high = tl.load(line + start // 32 + 1, mask=alive, other=0)
    word = tl.where((j % 64 < 32)[None, :], low[:, None], high[:, None])
else:
    word = low[:, None]"""

RANK = """rank = passed[:, None] + ones(word << (31 - bit)[None, :])  # nodes of the path down to j
if TREE_N == 64:
    rank += tl.where((j % 64 < 32)[None, :], 0, ones(low)[:, None])
distance = length[:, None] - rank"""

SINK = """
    # The weight of a key that has no value.
    total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - top)
"""

MERGE = '''

@triton.jit(do_not_specialize=["requests", "rows", "parts"], do_not_specialize_on_alignment=["node_offsets"])
def merge(
    partial,  # [parts, rows, VALUE] float32
    lse,  # [parts, rows] float32
    out,  # [rows, VALUE]
    node_offsets,{sinks}
    requests,
    rows,
    parts,
    PARTS: tl.constexpr,  # a power of two, at least `parts`
):
    """Program i: the parts of row i, weighted by log-sum-exp. Of a part that saw no key it is -inf."""
    row = tl.program_id(0).to(tl.int64)
    part, e = tl.arange(0, PARTS), tl.arange(0, {block})
    # NOTE loads that wait for no other: one trip to memory instead of three. What nobody wrote is replaced below.
    first, last = tl.load(node_offsets), tl.load(node_offsets + requests)
    part_lse = tl.load(lse + part * rows + row, mask=part < parts, other=float("-inf"))
    written = (part < parts)[:, None] & (e < VALUE)[None, :]
    x = tl.load(partial + (part * rows + row)[:, None] * VALUE + e[None, :], mask=written, other=0.0)
    best = tl.max(part_lse, 0)
    weight = tl.exp2(part_lse - best)
    total = tl.sum(weight, 0){sink}
    x = tl.where((part_lse > float("-inf"))[:, None], x * weight[:, None], 0.0)
    mean = tl.sum(x, 0) * (1.0 / total)
    node = row // HEADS
    owned = (node >= first) & (node < last)
    tl.store(out + row * VALUE + e, tl.where(owned, mean, 0.0).to(out.dtype.element_ty), mask=e < VALUE)
'''

MERGE_SINK = """
    total += tl.exp2(tl.load(sinks + row % HEADS).to(tl.float32) * LOG2E - best)"""
