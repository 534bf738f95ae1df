"""K and V of new tokens into a paged pool."""

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
