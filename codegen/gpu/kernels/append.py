"""K and V of new tokens into a paged pool, as they are or rotated."""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl


@triton.jit
def load_rows(x, x_t, x_h, x_d, tokens, live, head, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One head of x [T, H, D] at `tokens`, where `live`, and zeros: [tokens, BLOCK]."""
    dims = tl.arange(0, BLOCK)
    mask = live[:, None] & (dims < DIM)[None, :]
    return tl.load(x + head.to(tl.int64) * x_h + tokens[:, None] * x_t + dims[None, :] * x_d, mask=mask, other=0.0)


@triton.jit
def store_rows(
    rows, pool, pool_page, pool_h, pool_t, pool_d, live, index, page_size, head, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows [tokens, BLOCK] of one head into pool [pages, H, page_size, D] at `index`, where `live`."""
    dims = tl.arange(0, BLOCK)
    # NOTE: int64 before the product: a pool may have more than 2**31 numbers.
    page, offset = index // page_size, index % page_size
    row = pool + page[:, None] * pool_page + head.to(tl.int64) * pool_h + offset[:, None] * pool_t
    tl.store(row + dims[None, :] * pool_d, rows, mask=live[:, None] & (dims < DIM)[None, :])


@triton.jit
def store_token(
    keys, values, pool_k, pool_v, pool_k_page, pool_k_h, pool_k_t, pool_k_d, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
    live, index, page_size, head,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Keys and values of one head into their pools; values that are not all finite as zeros, and their keys as NaN.

    NOTE: what a node does not see is multiplied by 0, and 0 times NaN is NaN; a key that is not seen never is.
    """
    values = values.to(pool_v.dtype.element_ty)
    wide = values.to(tl.float32)
    lost = tl.max(((wide - wide) != 0.0).to(tl.int32), 1) > 0  # NaN and infinity less themselves are NaN
    keys = tl.where(lost[:, None], float("nan"), keys.to(tl.float32))
    values = tl.where(lost[:, None], 0.0, wide)
    store_rows(
        keys.to(pool_k.dtype.element_ty), pool_k, pool_k_page, pool_k_h, pool_k_t, pool_k_d,
        live, index, page_size, head, KEY_DIM, BLOCK_K,
    )  # fmt: skip
    store_rows(
        values.to(pool_v.dtype.element_ty), pool_v, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
        live, index, page_size, head, VALUE_DIM, BLOCK_V,
    )  # fmt: skip


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
    index = tl.load(write_index + tokens, mask=tokens < nodes, other=-1)
    live = index >= 0
    store_token(
        load_rows(k, k_t, k_h, k_d, tokens, live, head, KEY_DIM, BLOCK_K),
        load_rows(v, v_t, v_h, v_d, tokens, live, head, VALUE_DIM, BLOCK_V),
        pool_k, pool_v, pool_k_page, pool_k_h, pool_k_t, pool_k_d, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
        live, index, page_size, head, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
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
        index = tl.load(write_index + tokens, mask=there, other=-1)
        live = index >= 0
        keys = rotated(
            k, k_t, k_h, k_d, cos, cos_t, cos_d, sin, sin_t, sin_d, tokens, live, head,
            KEY_DIM, ROTARY, COLUMNS, HALF, BLOCK_K,
        )  # fmt: skip
        # NOTE: rounded to k's dtype first: a pool of another dtype holds what it would hold without the fusion
        store_token(
            keys.to(k.dtype.element_ty),
            load_rows(v, v_t, v_h, v_d, tokens, live, head, VALUE_DIM, BLOCK_V),
            pool_k, pool_v, pool_k_page, pool_k_h, pool_k_t, pool_k_d, pool_v_page, pool_v_h, pool_v_t, pool_v_d,
            live, index, page_size, head, KEY_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
        )  # fmt: skip
