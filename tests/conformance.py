"""What every kernel of an op must do as its reference does: calls at the edges of the contract, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import state_calls
import torch
from draws import as_tensors, distribution, levels, random_proposal
from superblock_cases import superblocks
from torch import Tensor
from tree_cases import Case, chain, random_tree

from treespec_compiler.ir import library, ops
from treespec_compiler.ir.narrow import FORMS
from treespec_compiler.ir.registry import Kernel, kernels
from treespec_compiler.ir.scores import POINTWISE

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Call:
    """One call of an op; `written`: places of the arguments, tensors or lists of them, that it writes."""

    arguments: tuple[Any, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    written: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    """Nodes whose rows must be 0."""
    spoilt: frozenset[int] | None = None
    """Nodes whose rows must be NaN, all others being finite; None: no matter."""

    def run(self, op: Any) -> tuple[Any, list[Any]]:
        """The result, and what was written; the call's own tensors stay as they are."""
        given = [_copied(a) if i in self.written else a for i, a in enumerate(self.arguments)]
        return op(*given, **self.changes), [given[i] for i in self.written]


def _copied(value: Any) -> Any:
    return [x.clone() for x in value] if isinstance(value, list) else value.clone()


# -- tree attention ---------------------------------------------------------------------------------------------------

FOREST = [(5, random_tree(6, 3), 6), (20, random_tree(9, 4), 4)]


def attention(case: Case, **changes: Any) -> Call:
    window = changes.pop("window", case.window)
    return Call((*case.arguments()[:-1], window), changes, written=(3, 4))


def padded(case: Case, before: int, behind: int, requests: int) -> Case:
    """Rows of no request around a case's own, and requests without nodes behind them, as a recorded graph has them."""

    def rows(x: Tensor, value: Any) -> Tensor:
        return torch.cat([x.new_full((n, *x.shape[1:]), value) if n else x[:0] for n in (before,)] + [x]
                         + [x.new_full((behind, *x.shape[1:]), value)])  # fmt: skip

    def requested(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(requests, *x.shape[1:])])

    made, meta = replace(case), case.meta
    made.meta = replace(
        meta,
        positions=rows(meta.positions, 0),
        write_index=rows(meta.write_index, -1),
        node_offsets=torch.cat([meta.node_offsets, meta.node_offsets[-1:].expand(requests)]) + before,
        page_table=requested(meta.page_table),
        prefix_lens=requested(meta.prefix_lens),
        tree_lens=requested(meta.tree_lens),
        ancestors=rows(meta.ancestors, 0),
    )
    for name in ("q", "k", "v"):
        own = getattr(case, name)
        around = [torch.full((1, own.shape[1], n, own.shape[3]), torch.nan, dtype=own.dtype) for n in (before, behind)]
        setattr(made, name, torch.cat([around[0], own, around[1]], 2))
    made.pool_k, made.pool_v = case.pool_k, case.pool_v
    return made


def rows_of_no_request(dtype: torch.dtype) -> Call:
    case = Case(FOREST, dtype=dtype)
    nodes = case.q.shape[2]
    call = attention(padded(case, 2, 3, 2))
    return replace(call, zero=(0, 1, *range(2 + nodes, 5 + nodes)), spoilt=frozenset())


def written_nowhere(dtype: torch.dtype) -> Call:
    """Nodes of requests whose keys are what the pool holds already."""
    case = Case(FOREST, dtype=dtype)
    index = case.meta.write_index.clone()
    index[[1, 4, 8]] = -1
    case.meta = replace(case.meta, write_index=index)
    return attention(case)


def chains(dtype: torch.dtype) -> Call:
    case = Case([(37, chain(70), 5), (0, chain(3), 3)], page_size=128, dtype=dtype)
    case.meta = replace(case.meta, ancestors=case.meta.ancestors[:, :0])
    return attention(case)


def no_pages(dtype: torch.dtype, words: bool, padding: int = 0) -> Call:
    case = Case([(0, chain(20) if not words else random_tree(20, 5), 20)], page_size=16, slot_pages=2, dtype=dtype)
    case = padded(case, 0, padding, 0) if padding else case
    ancestors = case.meta.ancestors if words else case.meta.ancestors[:, :0]
    case.meta = replace(case.meta, ancestors=ancestors, page_table=case.meta.page_table[:, :0])
    return replace(attention(case), zero=tuple(range(20, 20 + padding)), spoilt=frozenset())


def edges(dtype: torch.dtype, window: int = 0, chunk: int = 0) -> Call:
    requests = [(7, random_tree(9, 6), 9), (0, chain(17), 17), (15, [-1], 1)]
    return attention(Case(requests, dtype=dtype, window=window), chunk=chunk)


SPOILS: dict[str, Callable[[Case, int], None]] = {
    "a key of NaN": lambda case, i: case.k[0, :, i].fill_(torch.nan),
    "a value of NaN": lambda case, i: case.v[0, :, i].fill_(torch.nan),
    "NaN in one place of a value": lambda case, i: case.v[0, :, i, 3:4].fill_(torch.nan),
    "infinity in a value": lambda case, i: case.v[0, :, i, 3:4].fill_(torch.inf),
    "minus infinity in a value": lambda case, i: case.v[0, :, i].fill_(-torch.inf),
    "NaN in all of it": lambda case, i: [x[0, :, i].fill_(torch.nan) for x in (case.q, case.k, case.v)] and None,
    "an overflow": lambda case, i: case.v[0, :, i].copy_((case.v[0, :, i].float() * 1e38 * 1e38).to(case.dtype)),
}
TREE = [-1, 0, 0, 1, 1, 2, 2, 4, 5, 8]
BELOW = {2: {2, 5, 6, 8, 9}}  # by node: itself and what hangs below it, which see it
NEAR = {2: {2, 5, 6}}  # of these, those less than 2 levels away


def spoilt(dtype: torch.dtype, spoil: str, near: bool = False, **changes: Any) -> Call:
    """Node 2 of the first of two requests holds what is not finite."""
    case = Case([(5, TREE, 10), (11, random_tree(4, 7), 4)], dtype=dtype, page_size=32)
    SPOILS[spoil](case, 2)
    return replace(attention(case, **changes), spoilt=frozenset((NEAR if near else BELOW)[2]))


def spoilt_by_an_earlier_level(dtype: torch.dtype) -> Call:
    """The nodes of a second level see what a first one left in the pool."""
    first = Case([(5, TREE[:5], 5)], dtype=dtype)
    SPOILS["NaN in all of it"](first, 2)
    second = Case([(5, TREE, 5)], dtype=dtype)
    _, (second.pool_k, second.pool_v) = attention(first).run(ops.tree_attention)
    second.meta = replace(second.meta, write_index=_moved(first, second), page_table=first.meta.page_table)
    return replace(attention(second), spoilt=frozenset({0, 1, 3, 4}))  # nodes 5, 6, 8 and 9


def left_by_a_dropped_tree(dtype: torch.dtype) -> Call:
    """After a tree of which the root alone is kept, a slot's next tree lies where NaN was."""
    first = Case([(5, TREE, 10)], dtype=dtype)
    for node in (1, 2, 9):
        SPOILS["NaN in all of it"](first, node)
    second = Case([(6, TREE[:3], 3)], dtype=dtype)
    _, (second.pool_k, second.pool_v) = attention(first).run(ops.tree_attention)
    second.meta = replace(second.meta, write_index=_moved(first, second), page_table=first.meta.page_table)
    return replace(attention(second), spoilt=frozenset())


def _moved(first: Case, second: Case) -> Tensor:
    """Where the second case's nodes go if its slot is the first one's page."""
    return second.meta.write_index % second.page_size + first.meta.page_table[0, 0] * second.page_size


def scores(dtype: torch.dtype, **names: Any) -> Call:
    random = torch.Generator().manual_seed(3)
    made = {"slopes": (4,), "bias": (4, 9), "sinks": (4,)}
    tensors = {name: torch.rand(made[name], generator=random) for name in names if name in made}
    return attention(Case(FOREST, dtype=dtype), **{**names, **tensors})


def own_biases(dtype: torch.dtype) -> Call:
    case = Case(FOREST, dtype=dtype)
    random = torch.Generator().manual_seed(4)
    return attention(case, bias=torch.rand(case.q.shape[2], 4, 9, generator=random), window=6)


def turned(dtype: torch.dtype, style: str, rotary: int) -> Call:
    case = Case(FOREST, dtype=dtype)
    cos, sin = (torch.randn(case.q.shape[2], rotary // 2).to(dtype) for _ in range(2))
    return attention(case, cos=cos, sin=sin, style=style, rotary=rotary)


def shapes(dtype: torch.dtype, requests: Any = None, **sizes: Any) -> Call:
    return attention(Case(requests or FOREST, dtype=dtype, **sizes))


TREE_ATTENTION: dict[str, Callable[[torch.dtype], Call]] = {
    "rows of no request": rows_of_no_request,
    "nodes written nowhere": written_nowhere,
    "chains without words": chains,
    "no pages": lambda dtype: no_pages(dtype, words=True),
    "no pages and no words": lambda dtype: no_pages(dtype, words=False),
    "no pages, and rows of no request": lambda dtype: no_pages(dtype, words=False, padding=4),
    "one head for several": lambda dtype: shapes(dtype, heads=8, kv_heads=1),
    "as many heads": lambda dtype: shapes(dtype, heads=3, kv_heads=3),
    "odd dimensions": lambda dtype: shapes(dtype, dk=20, dv=7),
    "more than 64 nodes": lambda dtype: shapes(dtype, [(30, random_tree(100, 8), 12)], page_size=160),
    "several pages": lambda dtype: shapes(dtype, [(30, random_tree(9, 8), 5)], page_size=8, slot_pages=5),
    "a request without new nodes": lambda dtype: shapes(dtype, [(4, chain(3), 3), (9, chain(6), 0), (2, [-1], 1)]),
    **{f"a window of {n}": lambda dtype, n=n: edges(dtype, window=n) for n in (1, 2, 8, 16, 17)},
    **{f"chunks of {n}": lambda dtype, n=n: edges(dtype, chunk=n) for n in (1, 4, 8, 16)},
    "a window and chunks": lambda dtype: edges(dtype, 9, 5),
    "softcap": lambda dtype: scores(dtype, softcap=1.5),
    "slopes": lambda dtype: scores(dtype, slopes=True),
    "bias": lambda dtype: scores(dtype, bias=True),
    "a bias of each node": own_biases,
    "sinks": lambda dtype: scores(dtype, sinks=True),
    "every change": lambda dtype: scores(dtype, window=6, chunk=9, softcap=2.0, slopes=True, bias=True, sinks=True),
    **{f"weights by {name}": lambda dtype, name=name: scores(dtype, bias=True, activation=name) for name in POINTWISE},
    "NaN under weights of each score": lambda dtype: spoilt(dtype, "NaN in all of it", activation="relu"),
    "turned by halves": lambda dtype: turned(dtype, "half", 32),
    "turned by pairs, in part": lambda dtype: turned(dtype, "interleaved", 8),
    **{spoil: lambda dtype, spoil=spoil: spoilt(dtype, spoil) for spoil in SPOILS},
    "NaN out of a window": lambda dtype: spoilt(dtype, "NaN in all of it", near=True, window=2),
    "NaN under changed scores": lambda dtype: spoilt(dtype, "NaN in all of it", softcap=3.0),
    "NaN at the next level": spoilt_by_an_earlier_level,
    "NaN in a dropped tree": left_by_a_dropped_tree,
}


def chosen(dtype: torch.dtype, heads: int, weighted: bool, choice: tuple[int, int, int]) -> Call:
    """Scores of the indexer are whole numbers: they tie, and are the same in every type."""
    case = Case([*FOREST, (9, chain(5), 0)], dtype=dtype)
    random, nodes = torch.Generator().manual_seed(6), case.q.shape[2]
    shapes = ((1, nodes, heads, 4), (1, nodes, 4), (1, nodes, heads), (case.pool_k.shape[0], 1, case.page_size, 4))
    index_q, index_k, weights, pool = (torch.randint(-2, 3, s, generator=random).to(dtype) for s in shapes)
    index = (index_q, index_k, weights if weighted else None)
    q, k, v, pool_k, pool_v, *metadata = case.arguments()[:12]
    rest = (*metadata, case.scale, 0.5, *choice)
    return Call((q, k, v, *index, pool_k, pool_v, pool, *rest), written=(6, 7, 8))


# -- the other ops ----------------------------------------------------------------------------------------------------


def packed(dtype: torch.dtype, *shape: int, bias: bool = True, spoil: bool = False) -> Call:
    random = torch.Generator().manual_seed(4)
    x, weight = torch.randn(*shape, 24, generator=random).to(dtype), torch.randn(45, 24, generator=random).to(dtype)
    if spoil:
        x[1] = torch.nan
    b = torch.randn(45, generator=random).to(dtype) if bias else None
    return Call((x, ops.pack_weight(weight), b, 45), spoilt=frozenset({1}) if spoil else None)


def narrow(dtype: torch.dtype, form: str, rows: int) -> Call:
    random = torch.Generator().manual_seed(9)
    levels = 32 if form.startswith("q5") else 16
    weight = torch.randint(0, levels, (45, 64), generator=random).float() / levels - 0.5
    weight[:, ::32], weight[:, 1::32] = -0.5, 0.5 - 1 / levels  # the ends of four or five bits
    if form == "q8_0":
        weight = torch.randint(-127, 128, (45, 64), generator=random).float() / 64
        weight[:, ::32] = 127 / 64
    weight, headers = superblocks(form, 45, 512) if FORMS[form].header else (weight, None)
    x, b = torch.randn(rows, weight.shape[1], generator=random).to(dtype), torch.randn(45, generator=random).to(dtype)
    return Call((x, ops.pack_weight(weight, form, headers), b, 45, form))


def rows_of_table(dtype: torch.dtype, form: str, ids: list[list[int]]) -> Call:
    packed = narrow(dtype, form, 1).arguments[1] if form in FORMS else ops.pack_weight(torch.randn(45, 64))
    return Call((torch.tensor(ids, dtype=torch.int64), packed, 45, form))


def grouped(dtype: torch.dtype, ends: list[int], spoil: bool = False) -> Call:
    random = torch.Generator().manual_seed(5)
    x, weight = torch.randn(ends[-1], 16, generator=random), torch.randn(len(ends), 24, 16, generator=random)
    if spoil:
        x[1] = torch.nan
    return Call((x.to(dtype), weight.to(dtype), torch.tensor(ends)), spoilt=frozenset({1}) if spoil else None)


def commit(dtype: torch.dtype, src: list[int], dst: list[int]) -> Call:
    random = torch.Generator().manual_seed(6)
    pools = [torch.randn(2, 3, 4, 16, 6, generator=random).to(dtype), torch.randn(1, 3, 2, 16, 8, generator=random)]
    pools[0][0, 1, 0, 4] = torch.nan
    return Call((pools, torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64)), written=(0,))


def greedy(dtype: torch.dtype, sizes: list[int], spoil: bool = False) -> Call:
    random = torch.Generator().manual_seed(7)
    parents = [p for size in sizes for p in [-1, *(max(0, i - 2) for i in range(1, size))][:size]]
    logits = torch.randint(0, 4, (len(parents), 50), generator=random).to(dtype)  # full of ties
    tokens = torch.randint(0, 50, (len(parents),), generator=random)
    first = torch.tensor([0, *sizes]).cumsum(0)
    for begin, size in zip(first.tolist(), sizes):
        for i in range(1, size):
            tokens[begin + i] = logits[begin + parents[begin + i]].argmax()
    if spoil:
        logits[1, 3] = torch.nan
    return Call((logits, tokens, torch.tensor(parents, dtype=torch.int64), first, 2.0**-7))


def by_chance(rule: str, sampler: str) -> Call:
    rng = np.random.default_rng(8)
    proposals, targets = [], []
    for _ in range(3):
        p = [distribution(rng, 9) for _ in range(5)]
        proposals.append(random_proposal(rng, p, sampler))
        targets += p[: len(proposals[-1])]
    tensors = as_tensors(proposals, 9)
    uniforms = torch.from_numpy(rng.random((3, len(targets) + len(tensors[-1]))))
    return Call((torch.from_numpy(np.array(targets)), *tensors, uniforms, rule, levels(proposals)))


def wide(dtype: torch.dtype, sizes: list[int], delta: bool, value: int = 18) -> Call:
    return Call(**state_calls.recurrence(dtype, sizes, delta, shape=(2, 18, value)))


CALLS: dict[str, dict[str, Callable[[torch.dtype], Call]]] = {
    "tree_attention": TREE_ATTENTION,
    "packed_linear": {
        "one row": lambda dtype: packed(dtype, 1),
        "rows of several dimensions": lambda dtype: packed(dtype, 2, 3),
        "no bias": lambda dtype: packed(dtype, 9, bias=False),
        "no rows": lambda dtype: packed(dtype, 0),
        "NaN in one row": lambda dtype: packed(dtype, 4, spoil=True),
        **{f"weights in {form}": lambda dtype, form=form: narrow(dtype, form, 5) for form in FORMS},
        "many rows, weights in q4_1": lambda dtype: narrow(dtype, "q4_1", 40),
    },
    "packed_embedding": {
        "no ids": lambda dtype: rows_of_table(dtype, "float32", [[]]),
        **{
            f"a table in {form}": lambda dtype, form=form: rows_of_table(dtype, form, [[0, 44, 7], [16, 15, 44]])
            for form in ("float32", *FORMS)
        },
    },
    "grouped_linear": {
        "groups of any size": lambda dtype: grouped(dtype, [0, 3, 3, 4, 9]),
        "one group": lambda dtype: grouped(dtype, [5]),
        "NaN in one row": lambda dtype: grouped(dtype, [2, 5], spoil=True),
    },
    "commit_path": {
        "a path": lambda dtype: commit(dtype, [18, 20, 21, 30, 33, 40], [18, 19, 20, 21, 32, 33]),
        "pages in any order": lambda dtype: commit(dtype, [2, 3, 33, 34, 17], [47, 2, 3, 33, 16]),
        "no moves": lambda dtype: commit(dtype, [], []),
    },
    "greedy_accept": {
        "several requests": lambda dtype: greedy(dtype, [7, 1, 4]),
        "a request without nodes": lambda dtype: greedy(dtype, [3, 0, 5]),
        "NaN in a row": lambda dtype: greedy(dtype, [5, 3], spoil=True),
    },
    "stochastic_accept": {
        f"{rule}, {sampler}": lambda dtype, rule=rule, sampler=sampler: by_chance(rule, sampler)
        for rule, sampler in (
            ("naive", "iid"),
            ("multi-step", "iid"),
            ("recursive", "without-replacement"),
            ("traversal", "without-replacement"),
        )
    },
    "tree_chosen_attention": {
        "keys by weighted sums": lambda dtype: chosen(dtype, 3, True, (4, 1, 0)),
        "keys for each group of heads": lambda dtype: chosen(dtype, 2, False, (3, 1, 0)),
        "blocks": lambda dtype: chosen(dtype, 2, False, (2, 4, 1)),
        "more than there are": lambda dtype: chosen(dtype, 3, True, (50, 1, 0)),
    },
    "tree_convolution": {
        "each channel by itself": lambda dtype: Call(**state_calls.convolution(dtype, [7, 1, 4])),
        "groups of channels": lambda dtype: Call(**state_calls.convolution(dtype, [5, 9], groups=2)),
        "NaN in a node": lambda dtype: Call(**state_calls.convolution(dtype, [6], spoilt=True)),
        "more than 64 nodes": lambda dtype: Call(**state_calls.convolution(dtype, [3, 70])),
    },
    "tree_exponential_recurrence": {
        "what a token adds is read": lambda dtype: Call(**state_calls.exponential(dtype, [7, 1, 4], False, True)),
        "with a bonus": lambda dtype: Call(**state_calls.exponential(dtype, [5, 9], True, False)),
        "exponents that no number holds": lambda dtype: Call(**state_calls.exponential(dtype, [9], True, False, 300.0)),
        "more than 64 nodes": lambda dtype: Call(**state_calls.exponential(dtype, [70], False, False)),
    },
    "tree_recurrence": {
        "a delta rule": lambda dtype: Call(**state_calls.recurrence(dtype, [7, 1, 4], delta=True)),
        "plain writes": lambda dtype: Call(**state_calls.recurrence(dtype, [5, 9], delta=False)),
        "a decay for each row": lambda dtype: Call(**state_calls.recurrence(dtype, [5, 9], delta=True, rows=3)),
        "more than 64 nodes": lambda dtype: Call(**state_calls.recurrence(dtype, [70], delta=True)),
        "a delta rule of wide heads": lambda dtype: wide(dtype, [19, 1], delta=True),
        "plain writes of wide heads": lambda dtype: wide(dtype, [20, 3], delta=False, value=34),
        "wide heads, more than 64 nodes": lambda dtype: wide(dtype, [66], delta=True),
    },
}
"""By op and by what the call is about."""


def name_of(op: Any) -> str:
    return op._schema.name.removeprefix("treespec::")


def dtypes_of(kernel: Kernel, wanted: tuple[torch.dtype, ...]) -> list[torch.dtype]:
    """Those of the wanted ones that it takes, or any that it does."""
    found = [dtype for dtype in wanted if kernel.dtypes is None or dtype in kernel.dtypes]
    return found or sorted(kernel.dtypes or (), key=str)[:1]


def conforming(interpreted: bool) -> list[tuple[Kernel, str]]:
    """Every registered kernel with the calls it takes; those of Triton run in its interpreter alone."""
    found = []
    for name, calls in CALLS.items():
        for kernel in kernels(library.defined()[name]):
            if (kernel.name == "triton") == interpreted:
                found += [(kernel, what) for what in calls if takes(kernel, calls[what](torch.float32))]
    return found


def takes(kernel: Kernel, call: Call) -> bool:
    values = values_of(kernel, call)
    if kernel.condition is not None and not kernel.condition(values):
        return False
    return kernel.optional is None or library.given(kernel.op, values) <= kernel.optional


def check(kernel: Kernel, what: str, dtype: torch.dtype) -> None:
    """The kernel gives what the reference gives and writes what it writes, and both keep the call's promises.

    Spelled in numbers (`ir.numbered`) it is the same call.
    """
    call = CALLS[name_of(kernel.op)][what](dtype)
    (want, wanted), (got, written) = call.run(kernel.op), call.run(kernel.target)
    tolerance = TOLERANCE[dtype]
    for mine, theirs in zip((got, *_flat(written)), (want, *_flat(wanted)), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)
    for result in (want, got):
        promised(call, result)
    spelled = library.numbered(kernel.target, values_of(kernel, call))
    if spelled is not None:
        again, wrote = Call(spelled[1], written=call.written).run(spelled[0])
        for mine, theirs in zip((again, *_flat(wrote)), (got, *_flat(written)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=0, rtol=0, equal_nan=True)


def values_of(kernel: Kernel, call: Call) -> dict[str, Any]:
    names = [a.name for a in kernel.op._schema.arguments]
    return {**library.optional(kernel.op), **dict(zip(names, call.arguments)), **call.changes}


def promised(call: Call, result: Any) -> None:
    if call.zero:
        assert (result[:, :, list(call.zero)] == 0).all()
    if call.spoilt is not None:
        rows = result.transpose(1, 2)[0] if result.dim() == 4 else result
        for i, row in enumerate(rows):
            assert row.isnan().all() if i in call.spoilt else row.isfinite().all(), f"row {i}"


def _flat(values: list[Any]) -> list[Tensor]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]
