"""The accepted path's K/V to the end of the committed prefix, in every pool of a cache."""

# mypy: ignore-errors
# (a kernel's types are Triton's, known when it is compiled)

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["moves"])
def commit_kernel(
    lanes, src, dst, moves, page_size, WORD: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Program i moves every token of one head of one site, whose address, strides and width are in row i of `lanes`.

    Tokens are moved as words of WORD, so bits are kept whatever the pool's dtype is.
    """
    lane = lanes + tl.program_id(0).to(tl.int64) * 4
    base = tl.load(lane).to(tl.pointer_type(WORD))
    page_stride, token_stride, width = tl.load(lane + 1), tl.load(lane + 2), tl.load(lane + 3)
    words = tl.arange(0, BLOCK_W)
    first = 0
    while first < moves:
        j = first + tl.arange(0, BLOCK_J)
        live = j < moves
        source = tl.load(src + j, mask=live, other=0)
        target = tl.load(dst + j, mask=live, other=0)
        mask = live[:, None] & (words < width)[None, :]
        from_ = source // page_size * page_stride + source % page_size * token_stride
        to = target // page_size * page_stride + target % page_size * token_stride
        rows = tl.load(base + from_[:, None] + words[None, :], mask=mask)
        # NOTE: a target may be the source of an earlier move of this block, read by another thread: everything is read
        # before anything is written. Later blocks read behind all of that, as src[j'] > src[j] >= dst[j].
        tl.debug_barrier()
        tl.store(base + to[:, None] + words[None, :], rows, mask=mask)
        first += BLOCK_J
