"""Recurrences over the nodes of trees by blocks of nodes, where each head has one decay.

The equations are derived in docs/hybrids.md. S is a state, g a decay's logarithm, w what a node writes. Operands are
read in pieces of BLOCK_D rows of the state: whole ones would not fit a thread's registers.
"""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl

INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def first_row(tree_lens, request, requests, BLOCK_R: tl.constexpr):
    """Where the request's nodes begin in `state_rows`."""
    other = tl.arange(0, BLOCK_R)
    return tl.sum(tl.load(tree_lens + other, mask=(other < request) & (other < requests), other=0), 0)


@triton.jit
def sees(ancestors, row, node, live, words):
    """Whether nodes `row` of the call have `node` of their request as an ancestor, or are it; of any shape."""
    word = tl.load(ancestors + row * words + node // 64, mask=live, other=0)
    return live & (((word >> (node % 64)) & 1) != 0)


@triton.jit
def tile(base, row, row_stride, column, column_stride, live, WIDTH: tl.constexpr):
    """float32 [rows, columns] of a matrix; 0 where a row is not live, or there is no such column."""
    place = base + row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(place, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def either(new, new_row, new_stride, new_unit, kept, kept_row, kept_stride, fresh, column, live, WIDTH: tl.constexpr):
    """`tile` of nodes that are fresh in the call's own matrix, and of others in the stash."""
    found = tile(new, new_row, new_stride, column, new_unit, live & fresh, WIDTH)
    return found + tile(kept, kept_row, kept_stride, column, 1, live & (fresh == 0), WIDTH)


@triton.jit
def product(a, b):
    """Of float32, by exact products."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def finite(x):
    """By rows, 0 or 1."""
    return tl.min((tl.abs(x) < INFINITY).to(tl.int32), 1)


@triton.jit
def as_columns(x, n, m):
    """What is said of rows n, of columns m: [n] -> [m]; 0 where there is no such row."""
    return tl.sum(tl.where(n[:, None] == m[None, :], x[:, None], 0), 0)


@triton.jit
def on_path(ancestors, row, node, n, m, live, there, g, nodes, words, CHAIN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of rows n and the block's nodes m: (whether n sees m, sum of decays behind m within the block, sum of all).

    Decays are added up over the path from m to n, and are never a difference of sums.
    """
    pair = live[:, None] & there[None, :]
    if CHAIN:
        seen, seen_next = pair & (m[None, :] <= n[:, None]), pair & (m[None, :] + 1 <= n[:, None])
    else:
        seen = sees(ancestors, row[:, None], node[None, :], pair, words)
        follows = pair & ((m + 1 < BLOCK_N) & (node + 1 < nodes))[None, :]  # NOTE there may be no word behind the last
        seen_next = sees(ancestors, row[:, None], node[None, :] + 1, follows, words)
    since = tl.cumsum(tl.where(seen_next, as_columns(g, n, m + 1)[None, :], 0.0), 1, reverse=True)
    return seen, since, tl.sum(tl.where(seen, as_columns(g, n, m)[None, :], 0.0), 1)


# NOTE lists of a step lie one after the other: where they begin must not select a compilation.
@triton.jit(
    do_not_specialize=["requests"],
    do_not_specialize_on_alignment=[
        "node_offsets",
        "prefix_lens",
        "tree_lens",
        "ancestors",
        "state_slots",
        "state_rows",
    ],
)
def tree_recurrence_blocks_kernel(
    q, k, v, decay, beta, stash, state, carried, out,
    node_offsets, prefix_lens, tree_lens, ancestors, state_slots, state_rows, requests, words,
    q_t, q_h, q_d, k_t, k_h, k_d, v_t, v_h, v_d, decay_t, decay_h, beta_t, beta_h,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    DELTA: tl.constexpr, CHAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (r, h, e): request r, head h, columns e of its state; nodes in blocks of BLOCK_N, one after another.

    Each block reads the committed state and the nodes in front of it, and solves a unit-triangular system for its own
    w, which the stash keeps for the blocks behind. Of a CHAIN the state goes along in `carried` [requests, H, Dk, Dv].
    What is not finite at a node is left out of all sums, and makes those NaN that see it.
    """
    request, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // (HEADS // KEY_HEADS)
    WIDTH: tl.constexpr = KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM + HEADS
    kept_k, kept_w = stash + key_head * KEY_DIM, stash + KEY_HEADS * KEY_DIM + head * VALUE_DIM
    kept_decay = stash + KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM + head
    begin, end = tl.load(node_offsets + request), tl.load(node_offsets + request + 1)
    prefix, nodes = tl.load(prefix_lens + request), tl.load(tree_lens + request)
    old, first = nodes - (end - begin), first_row(tree_lens, request, requests, BLOCK_R)
    q, k, v, decay = q + key_head * q_h, k + key_head * k_h, v + head * v_h, decay + head * decay_h
    if DELTA:
        beta = beta + head * beta_h
    slot = tl.load(state_slots + request).to(tl.int64)
    state = state + (slot * HEADS + head) * KEY_DIM * VALUE_DIM
    n, m, piece = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    values = part * BLOCK_V + tl.arange(0, BLOCK_V)
    spoilt = begin < 0  # whether a chain has a node in front that is not finite
    if CHAIN:
        carried = carried + (request.to(tl.int64) * HEADS + head) * KEY_DIM * VALUE_DIM
        for d in range(0, KEY_DIM, BLOCK_D):
            S = tile(state, d + piece, VALUE_DIM, values, 1, d + piece < KEY_DIM, VALUE_DIM)
            inside = (d + piece < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
            place = carried + (d + piece)[:, None] * VALUE_DIM + values[None, :]
            tl.store(place, tl.where(prefix > 0, S, 0.0), mask=inside)
        tl.debug_barrier()

    start = old
    if CHAIN:
        start = old - tl.cdiv(old, BLOCK_N) * BLOCK_N  # the blocks of old nodes are passed through, too
    for at in range(start, nodes, BLOCK_N):
        node = at + n
        live, fresh = (node >= 0) & (node < nodes), node >= old
        row = begin + node - old  # of the call
        kept = tl.load(state_rows + first + node, mask=live, other=0)
        g = tl.load(decay + row.to(tl.int64) * decay_t, mask=live & fresh, other=0.0).to(tl.float32)
        w = tile(v, row, v_t, values, v_d, live & fresh, VALUE_DIM)
        if CHAIN:
            g += tl.load(kept_decay + kept * WIDTH, mask=live & (fresh == 0), other=0.0).to(tl.float32)
            w += tile(kept_w, kept, WIDTH, values, 1, live & (fresh == 0), VALUE_DIM)
        sound = finite(w) * (g < INFINITY).to(tl.int32)  # NOTE minus infinity forgets everything, and is a decay
        if DELTA:
            rate = tl.load(beta + row.to(tl.int64) * beta_t, mask=live & fresh, other=0.0).to(tl.float32)
            sound *= (tl.abs(rate) < INFINITY).to(tl.int32)
        if part == 0:
            tl.store(kept_decay + kept * WIDTH, g, mask=live & fresh)

        read = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)  # q' k
        alike = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)  # k' k
        found = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # of the state, by q
        known = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # of the state, by k
        for d in range(0, KEY_DIM, BLOCK_D):
            column = d + piece
            qs = tile(q, row, q_t, column, q_d, live & fresh, KEY_DIM)
            if CHAIN:
                ks = either(k, row, k_t, k_d, kept_k, kept, WIDTH, fresh, column, live, KEY_DIM)
                S = tile(carried, column, VALUE_DIM, values, 1, column < KEY_DIM, VALUE_DIM)
            else:
                ks = tile(k, row, k_t, column, k_d, live, KEY_DIM)
                S = tile(state, column, VALUE_DIM, values, 1, column < KEY_DIM, VALUE_DIM)
                S = tl.where(prefix > 0, S, 0.0)
            if part == 0 and head % (HEADS // KEY_HEADS) == 0:
                place = kept_k + (kept * WIDTH)[:, None] + column[None, :]
                tl.store(place, ks, mask=(live & fresh)[:, None] & (column < KEY_DIM)[None, :])
            sound *= finite(ks)
            read += product(qs, tl.trans(ks))
            found += product(qs, S)
            if DELTA:
                alike += product(ks, tl.trans(ks))
                known += product(ks, S)
        g = tl.where(sound != 0, g, 0.0)
        w = tl.where((sound != 0)[:, None], w, 0.0)

        seen, since, passed = on_path(ancestors, row, node, n, m, live, live, g, nodes, words, CHAIN, BLOCK_N)
        usable = seen & (as_columns(sound, n, m) != 0)[None, :]
        bad = (tl.max((seen & (as_columns(sound, n, m) == 0)[None, :]).to(tl.int32), 1) != 0) | spoilt
        read = tl.where(usable, read * tl.exp(since), 0.0)
        before_found = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        before_known = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if not CHAIN:
            for back in range(tl.cdiv(at - old, BLOCK_N) + tl.cdiv(old, BLOCK_N)):  # the nearest first
                other = at - (back + 1) * BLOCK_N + n
                exists, new = other >= 0, other >= old
                other_row, other_kept = begin + other - old, tl.load(state_rows + first + other, mask=exists, other=0)
                other_g = tl.load(decay + other_row.to(tl.int64) * decay_t, mask=exists & new, other=0.0).to(tl.float32)
                kept_g = tl.load(kept_decay + other_kept * WIDTH, mask=exists & (new == 0), other=0.0)
                other_g += kept_g.to(tl.float32)
                other_w = tile(kept_w, other_kept, WIDTH, values, 1, exists, VALUE_DIM)
                whole = finite(other_w) * (other_g < INFINITY).to(tl.int32)
                pairs_q = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
                pairs_k = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
                for d in range(0, KEY_DIM, BLOCK_D):
                    column = d + piece
                    other_k = either(
                        k, other_row, k_t, k_d, kept_k, other_kept, WIDTH, new, column, exists, KEY_DIM
                    )  # fmt: skip
                    whole *= finite(other_k)
                    pairs_q += product(tile(q, row, q_t, column, q_d, live, KEY_DIM), tl.trans(other_k))
                    if DELTA:
                        pairs_k += product(tile(k, row, k_t, column, k_d, live, KEY_DIM), tl.trans(other_k))
                other_g = tl.where(whole != 0, other_g, 0.0)
                other_w = tl.where((whole != 0)[:, None], other_w, 0.0)
                above, behind, total = on_path(
                    ancestors, row, at - (back + 1) * BLOCK_N + m, n, m, live, exists, other_g, nodes, words, False,
                    BLOCK_N,
                )  # fmt: skip
                used = above & (as_columns(whole, n, m) != 0)[None, :]
                faded = tl.exp(behind + passed[:, None])
                before_found += product(tl.where(used, pairs_q * faded, 0.0), other_w)
                if DELTA:
                    before_known += product(tl.where(used, pairs_k * faded, 0.0), other_w)
                passed += total
                bad = bad | (tl.max((above & (as_columns(whole, n, m) == 0)[None, :]).to(tl.int32), 1) != 0)

        rest = tl.exp(passed)[:, None]
        found = found * rest + before_found
        if DELTA:
            w = tl.where(fresh[:, None], rate[:, None] * (w - known * rest - before_known), w)
            w = tl.where((sound != 0)[:, None], w, 0.0)
            alike = tl.where(usable & (m[None, :] < n[:, None]), alike * tl.exp(since) * rate[:, None], 0.0)
            alike = tl.where((fresh & (sound != 0))[:, None], alike, 0.0)
            for c in range(BLOCK_N):  # rows behind c lose what they find of it
                own = tl.sum(tl.where(n[:, None] == c, w, 0.0), 0)
                w -= tl.sum(tl.where(m[None, :] == c, alike, 0.0), 1)[:, None] * own[None, :]
        found = tl.where(bad[:, None], float("nan"), found + product(read, w))
        stored = (live & fresh)[:, None] & (values < VALUE_DIM)[None, :]
        tl.store(out + (row.to(tl.int64) * HEADS + head)[:, None] * VALUE_DIM + values[None, :], found, mask=stored)
        marked = tl.where((sound == 0)[:, None], float("nan"), w)
        tl.store(kept_w + (kept * WIDTH)[:, None] + values[None, :], marked, mask=stored)
        # NOTE what follows reads w, and S, as other threads wrote them.
        tl.debug_barrier()
        if CHAIN:
            spoilt = spoilt | (tl.min(tl.where(live, sound, 1), 0) == 0)
            left = tl.exp(tl.sum(tl.where(m[None, :] > n[:, None], as_columns(g, n, m)[None, :], 0.0), 1))
            for d in range(0, KEY_DIM, BLOCK_D):
                column = d + piece
                ks = either(k, row, k_t, k_d, kept_k, kept, WIDTH, fresh, column, live, KEY_DIM)
                ks = tl.where((sound != 0)[:, None], ks * left[:, None], 0.0)
                S = tile(carried, column, VALUE_DIM, values, 1, column < KEY_DIM, VALUE_DIM)
                S = S * tl.exp(tl.sum(g, 0)) + product(tl.trans(ks), w)
                inside = (column < KEY_DIM)[:, None] & (values < VALUE_DIM)[None, :]
                tl.store(carried + column[:, None] * VALUE_DIM + values[None, :], S, mask=inside)
            tl.debug_barrier()
