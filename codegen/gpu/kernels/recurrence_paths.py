"""Recurrences over the nodes of trees along each node's path: rows of a state that decay apart, and narrow heads.

S is a state, g decays' logarithms, w what a node writes.
"""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl

from .recurrence_blocks import first_row


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
def tree_recurrence_paths_kernel(
    q, k, v, decay, beta, stash, state, out,
    node_offsets, prefix_lens, tree_lens, ancestors, state_slots, state_rows, requests, words,
    q_t, q_h, q_d, k_t, k_h, k_d, v_t, v_h, v_d, decay_t, decay_h, decay_d, beta_t, beta_h,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROWS: tl.constexpr,
    DELTA: tl.constexpr, CHAIN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (p, l): lanes of a state, BLOCK_L of its (head, column) pairs, along the path of each node.

    p is a row of the call: what plain writes leave depends on inputs alone. With DELTA, and of a CHAIN, it is a
    request, whose nodes are taken one after another.
    """
    if DELTA or CHAIN:
        request = tl.program_id(0)
    else:
        among = tl.arange(0, BLOCK_R)
        ends = tl.load(node_offsets + among + 1, mask=among < requests, other=2147483647)
        request = tl.sum((ends <= tl.program_id(0)).to(tl.int32), 0)
        if request >= requests:
            return
    begin, end = tl.load(node_offsets + request), tl.load(node_offsets + request + 1)
    prefix, nodes = tl.load(prefix_lens + request), tl.load(tree_lens + request)
    old, first = nodes - (end - begin), first_row(tree_lens, request, requests, BLOCK_R)
    from_, to = old, nodes
    if not (DELTA or CHAIN):
        if tl.program_id(0) < begin:  # a row of no request
            return
        from_ = old + tl.program_id(0) - begin
        to = from_ + 1

    WIDTH: tl.constexpr = KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM + HEADS * ROWS
    lane = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    head, value, live = lane // VALUE_DIM, lane % VALUE_DIM, lane < HEADS * VALUE_DIM
    key_head, d = head // (HEADS // KEY_HEADS), tl.arange(0, BLOCK_K)
    inside = live[:, None] & (d < KEY_DIM)[None, :]
    of_q, of_k = key_head[:, None] * q_h + d[None, :] * q_d, key_head[:, None] * k_h + d[None, :] * k_d
    of_v, of_decay = head * v_h + value * v_d, head[:, None] * decay_h + d[None, :] * decay_d
    kept_k = key_head[:, None] * KEY_DIM + d[None, :]
    kept_w = KEY_HEADS * KEY_DIM + lane
    kept_decay = KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM + head[:, None] * ROWS + (d % ROWS)[None, :]
    own_decay = live[:, None] & (value == 0)[:, None] & (d < ROWS)[None, :]
    own_k = inside & (value == 0)[:, None] & (head % (HEADS // KEY_HEADS) == 0)[:, None]

    slot = tl.load(state_slots + request).to(tl.int64)
    place = state + (slot * HEADS + head[:, None]) * KEY_DIM * VALUE_DIM + d[None, :] * VALUE_DIM + value[:, None]
    S = tl.where(prefix > 0, tl.load(place, mask=inside, other=0.0).to(tl.float32), 0.0)
    if CHAIN:
        for before in range(old):
            kept = stash + tl.load(state_rows + first + before) * WIDTH
            g = tl.load(kept + kept_decay, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(kept + kept_w, mask=live, other=0.0).to(tl.float32)
            S = S * tl.exp(g) + w[:, None] * tl.load(kept + kept_k, mask=inside, other=0.0).to(tl.float32)

    for node in range(from_, to):
        row = (begin + node - old).to(tl.int64)
        now = S
        if not CHAIN:
            for before in range(node):
                word = tl.load(ancestors + row * words + before // 64)
                if ((word >> (before % 64)) & 1) != 0:
                    kept = stash + tl.load(state_rows + first + before) * WIDTH
                    there = row + before - node
                    if before >= old:
                        g = tl.load(decay + there * decay_t + of_decay, mask=inside, other=0.0).to(tl.float32)
                        b = tl.load(k + there * k_t + of_k, mask=inside, other=0.0).to(tl.float32)
                    else:
                        g = tl.load(kept + kept_decay, mask=inside, other=0.0).to(tl.float32)
                        b = tl.load(kept + kept_k, mask=inside, other=0.0).to(tl.float32)
                    if DELTA:
                        w = tl.load(kept + kept_w, mask=live, other=0.0).to(tl.float32)
                    elif before >= old:  # what a node writes is its v
                        w = tl.load(v + there * v_t + of_v, mask=live, other=0.0).to(tl.float32)
                    else:
                        w = tl.load(kept + kept_w, mask=live, other=0.0).to(tl.float32)
                    now = now * tl.exp(g) + w[:, None] * b
        g = tl.load(decay + row * decay_t + of_decay, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(k + row * k_t + of_k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(v + row * v_t + of_v, mask=live, other=0.0).to(tl.float32)
        now = now * tl.exp(g)
        if DELTA:
            rate = tl.load(beta + row * beta_t + head * beta_h, mask=live, other=0.0).to(tl.float32)
            w = rate * (w - tl.sum(now * b, 1))
        now += w[:, None] * b
        a = tl.load(q + row * q_t + of_q, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * HEADS * VALUE_DIM + lane, tl.sum(now * a, 1), mask=live)
        kept = stash + tl.load(state_rows + first + node) * WIDTH
        tl.store(kept + kept_w, w, mask=live)
        tl.store(kept + kept_decay, g, mask=own_decay)
        tl.store(kept + kept_k, b, mask=own_k)
        if CHAIN:
            S = now
        elif DELTA:
            # NOTE nodes below read w as other threads wrote it.
            tl.debug_barrier()
