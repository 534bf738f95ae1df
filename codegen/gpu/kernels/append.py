"""K and V of new tokens into a paged pool, as they are or rotated."""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    x, x_t, x_h, x_d, pool, pool_page, pool_h, pool_t, pool_d, tokens, live, slot, page_size, head,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of x [T, H, D] at `tokens` into pool [pages, H, page_size, D] at `slot`, where `live`."""
    dims = tl.arange(0, BLOCK)
    mask = live[:, None] & (dims < DIM)[None, :]
    head = head.to(tl.int64)
    rows = tl.load(x + head * x_h + tokens[:, None] * x_t + dims[None, :] * x_d, mask=mask)
    # NOTE: int64 before the product: a pool may have more than 2**31 numbers.
    page, offset = slot // page_size, slot % page_size
    place = pool + page[:, None] * pool_page + head * pool_h + offset[:, None] * pool_t + dims[None, :] * pool_d
    tl.store(place, rows.to(pool.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["nodes"])
def append_kernel(
    k, v, pool_k, pool_v, write_index, nodes, page_size,
    k_t, k_h, k_d,
    v_t, v_h, v_d,
    pool_k_page, pool_k_h, pool_k_t, pool_k_d,
    pool_v_page, pool_v_h, pool_v_t, pool_v_d,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (i, h): head h of tokens i * BLOCK_T ... A negative write index writes nothing."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    slot = tl.load(write_index + tokens, mask=tokens < nodes, other=-1)
    live = slot >= 0
    copy_rows(
        k, k_t, k_h, k_d, pool_k, pool_k_page, pool_k_h, pool_k_t, pool_k_d,
        tokens, live, slot, page_size, head, KEY_DIM, BLOCK_K,
    )  # fmt: skip
    copy_rows(
        v, v_t, v_h, v_d, pool_v, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
        tokens, live, slot, page_size, head, VALUE_DIM, BLOCK_V,
    )  # fmt: skip


@triton.jit
def rotated(
    x, x_t, x_h, x_d, cos, cos_t, cos_c, sin, sin_t, sin_c, tokens, live, head,
    DIM: tl.constexpr, ROTARY: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of x [T, H, D] at `tokens`, its first ROTARY numbers turned in pairs: [tokens, BLOCK] float32."""
    dims = tl.arange(0, BLOCK)
    if HALF:
        first = dims < ROTARY // 2
        other = tl.where(first, dims + ROTARY // 2, dims - ROTARY // 2)
        angle = tl.where(first, dims, dims - ROTARY // 2)
    else:
        first = dims % 2 == 0
        other = tl.where(first, dims + 1, dims - 1)
        angle = dims // 2
    column = dims if COLUMNS == ROTARY else angle
    turned = live[:, None] & (dims < ROTARY)[None, :]
    row = x + head.to(tl.int64) * x_h + tokens[:, None] * x_t
    own = tl.load(row + dims[None, :] * x_d, mask=live[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)
    partner = tl.load(row + other[None, :] * x_d, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + tokens[:, None] * cos_t + column[None, :] * cos_c, mask=turned, other=0.0).to(tl.float32)
    s = tl.load(sin + tokens[:, None] * sin_t + column[None, :] * sin_c, mask=turned, other=0.0).to(tl.float32)
    return tl.where(turned, own * c + tl.where(first[None, :], -partner, partner) * s, own)


@triton.jit(do_not_specialize=["nodes"])
def rope_append_kernel(
    q, k, v, rotated_q, pool_k, pool_v, write_index, cos, sin, nodes, page_size,
    q_t, q_h, q_d,
    k_t, k_h, k_d,
    v_t, v_h, v_d,
    out_t, out_h, out_d,
    pool_k_page, pool_k_h, pool_k_t, pool_k_d,
    pool_v_page, pool_v_h, pool_v_t, pool_v_d,
    cos_t, cos_d, sin_t, sin_d,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (i, h), tokens i * BLOCK_T ..: a head h < HEADS of q goes to `rotated_q`, turned; behind those, a head of
    k, turned, and of v go to the pools.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    there = tokens < nodes
    dims = tl.arange(0, BLOCK_K)
    if head < HEADS:
        rows = rotated(
            q, q_t, q_h, q_d, cos, cos_t, cos_d, sin, sin_t, sin_d, tokens, there, head,
            KEY_DIM, ROTARY, COLUMNS, HALF, BLOCK_K,
        )  # fmt: skip
        to = rotated_q + head.to(tl.int64) * out_h + tokens[:, None] * out_t + dims[None, :] * out_d
        tl.store(to, rows.to(rotated_q.dtype.element_ty), mask=there[:, None] & (dims < KEY_DIM)[None, :])
    else:
        head -= HEADS
        slot = tl.load(write_index + tokens, mask=there, other=-1)
        live = slot >= 0
        keys = rotated(
            k, k_t, k_h, k_d, cos, cos_t, cos_d, sin, sin_t, sin_d, tokens, live, head,
            KEY_DIM, ROTARY, COLUMNS, HALF, BLOCK_K,
        )  # fmt: skip
        page, offset = slot // page_size, slot % page_size
        place = pool_k + page[:, None] * pool_k_page + head.to(tl.int64) * pool_k_h + offset[:, None] * pool_k_t
        # NOTE: rounded to k's dtype first: a pool of another dtype holds what it would hold without the fusion
        keys = keys.to(k.dtype.element_ty).to(pool_k.dtype.element_ty)
        tl.store(place + dims[None, :] * pool_k_d, keys, mask=live[:, None] & (dims < KEY_DIM)[None, :])
        copy_rows(
            v, v_t, v_h, v_d, pool_v, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
            tokens, live, slot, page_size, head, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
