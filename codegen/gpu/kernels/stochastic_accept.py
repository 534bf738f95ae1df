"""Acceptance by chance: what is owed after every rejection, then a walk."""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl

# NOTE lists of a step lie one after the other in one block of memory: neither how many numbers they have nor where they
# begin may select a compilation, which would take seconds in the middle of a generation.
SIZES = ["uniform_stride", "requests"]
LISTS = ["tokens", "parents", "node_offsets", "draw_offsets", "draw_rows", "draw_q", "draw_of", "uniforms"]
FOUND = ["first_weights", "next_weights", "last_weights", "weights", "ratios", "totals", "lefts", "sums", "out"]


@triton.jit
def owed_after(
    p, q, q_stride, tokens, draw_rows, draw_q, weights, totals, lefts, begin, stop, ids, live,
    REPLACEMENT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """p and q at `ids` [BLOCK] when draws begin .. stop - 1 of a node were rejected; q is what a next draw of the same
    row of q would be from.

    NOTE: computed anew from p and q and the sums found before, so that no row is ever written: a row of float64 for
    every node would be more memory than the logits.
    """
    owed = tl.load(p + ids, mask=live, other=0.0)
    proposed = tl.zeros_like(owed)
    group = tl.full([], -1, tl.int64)
    draw = begin
    while draw < stop:
        row = tl.load(draw_q + draw)
        token = tl.load(tokens + tl.load(draw_rows + draw))
        proposed = first_proposed(q, q_stride, row, group, proposed, token, ids, live)
        group = row
        total = tl.load(totals + draw)
        if total > 0.0:
            if WEIGHTED:
                owed = owed * tl.load(weights + draw)
            owed = tl.maximum(owed - proposed, 0.0) / total
        if not REPLACEMENT:
            proposed = tl.where(ids == token, 0.0, proposed)
            left = tl.load(lefts + draw)
            if left > 0.0:
                proposed = proposed / left
        draw += 1
    return owed, proposed, group


@triton.jit
def first_proposed(q, q_stride, row, group, proposed, token, ids, live):
    """What a draw is from: `proposed` goes on while the row of q is the same, and a one-hot draw is its own row."""
    if row < 0:
        proposed = tl.where(ids == token, 1.0, 0.0).to(tl.float64)
    elif row != group:
        proposed = tl.load(q + row * q_stride + ids, mask=live, other=0.0)
    return proposed


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS + FOUND)
def residual_kernel(
    p, p_stride, q, q_stride, tokens, draw_offsets, draw_rows, draw_q, first_weights, next_weights, last_weights,
    weights, ratios, totals, lefts, sums, V,
    REPLACEMENT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i, for the draws below node i: the probability to accept each when those before it were rejected, and the
    sums that `owed_after` divides by; then the sums of each BLOCK of what is owed after all, to sums [N, blocks].

    WEIGHTED (the traversal rule): first_weights [N] are 1 at roots and negative elsewhere. A node gives its children
    theirs, as next_weights [N], which are the first ones of the next launch: within a launch, nothing is read that
    another program writes. last_weights [N], negative before, are those after all draws were rejected, and say that the
    node is done; weights [D] those before each.
    """
    node = tl.program_id(0).to(tl.int64)
    p += node * p_stride
    weight = tl.full([], 1.0, tl.float64)
    if WEIGHTED:
        weight = tl.load(first_weights + node)
        if (weight < 0.0) | (tl.load(last_weights + node) >= 0.0):
            return
    begin, end = tl.load(draw_offsets + node), tl.load(draw_offsets + node + 1)
    draw = begin
    while draw < end:
        row = tl.load(draw_q + draw)
        token = tl.load(tokens + tl.load(draw_rows + draw))
        at = token + tl.arange(0, 1)  # one place, by the same code
        mine, its_q, its_row = owed_after(
            p, q, q_stride, tokens, draw_rows, draw_q, weights, totals, lefts, begin, draw, at, at >= 0,
            REPLACEMENT, WEIGHTED,
        )  # fmt: skip
        its_q = first_proposed(q, q_stride, row, its_row, its_q, token, at, at >= 0)
        mine = mine * weight
        ratio = tl.where(mine <= 0.0, 0.0, tl.where(mine >= its_q, 1.0, mine / its_q))
        tl.store(ratios + draw + tl.arange(0, 1), ratio)
        if WEIGHTED:
            tl.store(weights + draw, weight)
            tl.store(next_weights + tl.load(draw_rows + draw) + tl.arange(0, 1), ratio)

        rest = tl.zeros([BLOCK], tl.float64)
        left = tl.zeros([BLOCK], tl.float64)
        start = 0
        while start < V:
            ids = start + tl.arange(0, BLOCK)
            live = ids < V
            owed, proposed, group = owed_after(
                p, q, q_stride, tokens, draw_rows, draw_q, weights, totals, lefts, begin, draw, ids, live,
                REPLACEMENT, WEIGHTED,
            )  # fmt: skip
            proposed = first_proposed(q, q_stride, row, group, proposed, token, ids, live)
            rest += tl.maximum(owed * weight - proposed, 0.0)
            left += tl.where(ids == token, 0.0, proposed)
            start += BLOCK
        total = tl.sum(rest, 0)
        tl.store(totals + draw, total)
        tl.store(lefts + draw, tl.sum(left, 0))
        if WEIGHTED:
            rejected = total + 1.0 - weight  # how likely that was
            if rejected > 0.0:
                weight = tl.minimum(total / rejected, 1.0)
        tl.debug_barrier()  # every thread reads these sums for the next draw
        draw += 1

    blocks = tl.cdiv(V, BLOCK)
    block = 0
    while block < blocks:
        ids = block * BLOCK + tl.arange(0, BLOCK)
        owed, proposed, group = owed_after(
            p, q, q_stride, tokens, draw_rows, draw_q, weights, totals, lefts, begin, end, ids, ids < V,
            REPLACEMENT, WEIGHTED,
        )  # fmt: skip
        tl.store(sums + node * blocks + block, tl.sum(owed, 0))
        block += 1
    if WEIGHTED:
        tl.store(last_weights + node, weight)


@triton.jit
def choose(
    number, p, p_stride, q, q_stride, tokens, draw_offsets, draw_rows, draw_q, weights, totals, lefts, sums, node, V,
    blocks, REPLACEMENT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first id whose cumulative weight is above `number` times the whole, of what is owed after row `node`."""
    b = tl.arange(0, BLOCKS)
    shares = tl.load(sums + node * blocks + b, mask=b < blocks, other=0.0)
    ends = tl.cumsum(shares, 0)
    aim = number * tl.sum(shares, 0)
    # NOTE: a block or an id of weight 0 is never taken, however sums are rounded; the last of weight if none is above
    block = tl.min(tl.where((ends > aim) & (shares > 0.0), b, BLOCKS), 0)
    last = tl.max(tl.where(shares > 0.0, b, 0), 0)
    block = tl.minimum(block, last)
    before = tl.sum(tl.where(b == block, ends - shares, 0.0), 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(draw_offsets + node), tl.load(draw_offsets + node + 1)
    owed, _proposed, _group = owed_after(
        p + node * p_stride, q, q_stride, tokens, draw_rows, draw_q, weights, totals, lefts, begin, end, ids, ids < V,
        REPLACEMENT, WEIGHTED,
    )  # fmt: skip
    above = (before + tl.cumsum(owed, 0) > aim) & (owed > 0.0)
    first = tl.min(tl.where(above, ids, V), 0)
    return tl.minimum(first, tl.max(tl.where(owed > 0.0, ids, 0), 0)).to(tl.int64)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS + FOUND)
def chance_walk_kernel(
    p, p_stride, q, q_stride, tokens, parents, node_offsets, draw_offsets, draw_rows, draw_q, uniforms, uniform_stride,
    weights, ratios, totals, lefts, sums, out, requests, V, blocks,
    NAIVE: tl.constexpr, REPLACEMENT: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program r: request r's path, one uniform number after the other."""
    r = tl.program_id(0).to(tl.int64)
    first, end = tl.load(node_offsets + r), tl.load(node_offsets + r + 1)
    uniforms += r * uniform_stride
    nodes = end - first
    node = tl.arange(0, BLOCK_N)
    path = out + requests * FIELDS + first
    tl.store(path + node, tl.full([BLOCK_N], -1, tl.int64), mask=node < nodes)
    tl.debug_barrier()
    used = tl.full([], 0, tl.int64)
    length = tl.full([], 0, tl.int64)
    bonus = tl.full([], -1, tl.int64)
    last = tl.full([], 0, tl.int64)
    going = nodes > 0
    if NAIVE:
        token = tl.load(tokens + first + node, mask=node < nodes, other=-1)
        parent = tl.load(parents + first + node, mask=node < nodes, other=-1)
    while going:
        tl.store(path + length, last)
        length += 1
        child = tl.full([], -1, tl.int64)
        if NAIVE:
            bonus = choose(
                tl.load(uniforms + used), p, p_stride, q, q_stride, tokens, draw_offsets, draw_rows, draw_q, weights,
                totals, lefts, sums, first + last, V, blocks, REPLACEMENT, False, BLOCK, BLOCKS,
            )  # fmt: skip
            used += 1
            fits = (node > 0) & (node < nodes) & (parent == last) & (token == bonus)
            found = tl.min(tl.where(fits, node, BLOCK_N), 0)
            child = tl.where(found < BLOCK_N, found, -1).to(tl.int64)
        else:
            draw = tl.load(draw_offsets + first + last)
            stop = tl.load(draw_offsets + first + last + 1)
            while draw < stop:
                if tl.load(uniforms + used) < tl.load(ratios + draw):
                    child = tl.load(draw_rows + draw) - first
                    draw = stop
                else:
                    draw += 1
                used += 1
            if child < 0:
                bonus = choose(
                    tl.load(uniforms + used), p, p_stride, q, q_stride, tokens, draw_offsets, draw_rows, draw_q,
                    weights, totals, lefts, sums, first + last, V, blocks, REPLACEMENT, False, BLOCK, BLOCKS,
                )  # fmt: skip
                used += 1
        going = child >= 0
        last = child
    tl.store(out + r * FIELDS, length)
    tl.store(out + r * FIELDS + 1, bonus)
    tl.store(out + r * FIELDS + 2, used)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS + FOUND)
def traversal_kernel(
    p, p_stride, q, q_stride, tokens, parents, node_offsets, draw_offsets, draw_rows, draw_q, draw_of, uniforms,
    uniform_stride, last_weights, weights, ratios, totals, lefts, sums, out, requests, V, blocks,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program r: request r's path by the traversal rule: down to the first leaf, then up and on until a node passes.

    draw_of [N] says which draw a node is, so that the way back needs no stack.
    """
    r = tl.program_id(0).to(tl.int64)
    first, end = tl.load(node_offsets + r), tl.load(node_offsets + r + 1)
    uniforms += r * uniform_stride
    nodes = end - first
    used = tl.full([], 0, tl.int64)
    bonus = tl.full([], -1, tl.int64)
    here = tl.full([], 0, tl.int64)
    depth = tl.full([], 0, tl.int64)
    going = nodes > 0
    draw = tl.full([], 0, tl.int64)
    if going:
        draw = tl.load(draw_offsets + first)
    while going:
        if draw < tl.load(draw_offsets + first + here + 1):
            if tl.load(ratios + draw) > 0.0:
                here = tl.load(draw_rows + draw) - first
                depth += 1
                draw = tl.load(draw_offsets + first + here)
            else:
                draw += 1
        else:
            passes = here == 0
            if here > 0:
                passes = tl.load(uniforms + used) < tl.load(last_weights + first + here)
                used += 1
            if passes:
                going = False
            else:
                draw = tl.load(draw_of + first + here) + 1
                here = tl.load(parents + first + here)
                depth -= 1
    if nodes > 0:
        bonus = choose(
            tl.load(uniforms + used), p, p_stride, q, q_stride, tokens, draw_offsets, draw_rows, draw_q, weights,
            totals, lefts, sums, first + here, V, blocks, False, True, BLOCK, BLOCKS,
        )  # fmt: skip
        used += 1
        node = tl.arange(0, BLOCK_N)
        path = out + requests * FIELDS + first
        tl.store(path + node, tl.full([BLOCK_N], -1, tl.int64), mask=(node < nodes) & (node > depth))
        place = depth
        while place >= 0:
            tl.store(path + place, here)
            if place > 0:
                here = tl.load(parents + first + here)
            place -= 1
        depth += 1
    tl.store(out + r * FIELDS, depth)
    tl.store(out + r * FIELDS + 1, bonus)
    tl.store(out + r * FIELDS + 2, used)
