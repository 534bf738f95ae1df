"""Random forests for tree attention, and the check of an op on one against the dense answer in float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from tree_cases import Case

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(op, case: Case) -> None:
    arguments = case.arguments()
    got = op(*arguments)
    out, pool_k, pool_v = case.expected()
    assert got.dtype == case.dtype
    assert got.transpose(1, 2).is_contiguous()
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(arguments[3].double(), pool_k, atol=0, rtol=0)
    torch.testing.assert_close(arguments[4].double(), pool_v, atol=0, rtol=0)


@st.composite
def forests(draw) -> Case:
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        nodes = draw(st.integers(1, 70))
        parents = [draw(st.integers(-1, i - 1)) for i in range(nodes)]
        requests.append((draw(st.integers(0, 90)), parents, draw(st.integers(1, nodes))))
    kv_heads = draw(st.integers(1, 3))
    return Case(
        requests,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dk=draw(st.integers(1, 40)),
        dv=draw(st.integers(1, 40)),
        window=draw(st.sampled_from([0, 1, 5, 33, 80])),
        page_size=160,
    )
