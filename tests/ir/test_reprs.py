"""What notebooks show, and logging from the environment."""

from __future__ import annotations

import xml.etree.ElementTree as xml

from graph_cases import EAGER, decoder

import treespec_compiler as treespec
from treespec_compiler.ir.drawing import SEEN, mask_svg, tree_mask
from treespec_compiler.ir.specs import MaskSpec

SVG = "{http://www.w3.org/2000/svg}"


def seen_cells(svg: str) -> int:
    return sum(r.get("fill") == SEEN for r in xml.fromstring(svg).iter(f"{SVG}rect"))


def test_tree_and_masks_are_drawn() -> None:
    tree = treespec.TokenTree([5, 6, 7, 8], [-1, 0, 0, 1])
    root = xml.fromstring(tree._repr_svg_())
    assert len(list(root.iter(f"{SVG}circle"))) == 4 and len(list(root.iter(f"{SVG}path"))) == 3
    assert seen_cells(MaskSpec()._repr_svg_()) == 24 * 25 // 2
    assert seen_cells(MaskSpec(window=3)._repr_svg_()) == 24 * 3 - 3


def test_topology_mask_is_ancestors_within_the_window() -> None:
    mask = tree_mask([-1, 0, 0, 1], 2, MaskSpec(window=3).sees)
    assert [[int(x) for x in row] for row in mask] == [
        [1, 1, 1, 0, 0, 0],  # the root sees the whole prefix
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 1, 0],  # not its sibling
        [0, 0, 1, 1, 0, 1],
    ]
    assert "<svg" in mask_svg(mask, "tree", prefix=2)


def test_program_is_a_table() -> None:
    program = treespec.tree_program(decoder(), options=EAGER)
    html = program._repr_html_()
    assert html.count("<tr>") == 3 and "<code>k &lt;= q</code>" in html
