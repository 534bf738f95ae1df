"""The report in a real browser: it opens, finds nodes, unfolds passes, shows sources, and uses no network.

Needs chromium (Debian: `apt-get install chromium`) and the package playwright; skips without them, except in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graph_cases import EAGER, deep, summing, windowed

from treespec_compiler.capture.call import call_spec
from treespec_compiler.inspection.report.collect import collect
from treespec_compiler.inspection.report.page import page as html_of
from treespec_compiler.options import Options

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def write(folder: Path, name: str, factory: Any) -> Path:
    model = factory()
    content = collect(model, name, call_spec(model), Options.parse(EAGER))
    path = folder / f"{name}.html"
    path.write_text(html_of(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.problems = []
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith("file:") else tab.problems.append(r.url))
    yield tab
    assert tab.problems == []
    tab.close()


def shoot(tab: Any, name: str) -> None:
    """Screenshots to look at, where a folder is named for them."""
    if folder := os.environ.get("TREESPEC_SCREENSHOTS"):
        tab.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.rare
@pytest.mark.slow
def test_thirty_two_layers(tab: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "deep", deep)
    assert path.stat().st_size < 3_000_000
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.inner_text("#verdict") == "converted: Decoder, 32 attention sites"
    assert tab.locator("#timeline .bar").count() == tab.locator("details.pass").count() >= 8
    shoot(tab, "top")

    # a pass: 32 layers that changed alike are folded but one
    tab.locator("#timeline .bar", has_text="insert state").click()
    opened = tab.locator("details.pass[open]")
    assert opened.count() == 1
    layers = opened.locator("details.layer[data-group^='layers.']")
    layers.first.wait_for()
    assert layers.count() == 32
    assert opened.locator("details.layer[data-group^='layers.'][open]").count() == 1
    assert "as in layers.0" in layers.nth(7).inner_text()
    added = opened.locator(".row.added", has_text="treespec.tree_attention(").first
    assert opened.locator(".row.removed", has_text="treespec.causal_attention(").count() == 1
    layers.nth(7).locator("summary").click()
    layers.nth(7).locator(".row.added").first.wait_for()

    # a node: its source line
    added.click()
    assert tab.is_visible("#panel")
    assert "graph_cases.py:" in tab.inner_text("#panel .source")
    assert "scaled_dot_product_attention" in tab.inner_text("#panel mark")
    assert "touched by" in tab.inner_text("#panel") and "insert state" in tab.inner_text("#panel")
    shoot(tab, "pass")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#panel")

    # before and after, changes only
    opened.locator("select").select_option("before")
    assert opened.locator(".row", has_text="treespec.tree_attention(").count() == 0
    opened.locator("select").select_option("both")
    opened.locator("input[type=checkbox]").check()
    assert opened.locator(".row.same").count() == 0

    # search
    tab.keyboard.press("/")
    tab.keyboard.type("layers.31 tree_attention")
    tab.wait_for_selector("#results:not([hidden])")
    assert tab.locator("#results .row").count() >= 1
    assert "tree_attention" in tab.locator("#results .row").first.inner_text()
    tab.locator("#results .row").first.click()
    assert "layers.31" in tab.inner_text("#panel")
    shoot(tab, "search")


def test_masks_and_tree(tab: Any, tmp_path: Path) -> None:
    tab.goto(write(tmp_path, "windowed", windowed).as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.locator("#masks svg").count() == 2
    assert "k <= q and q - k < 8" in tab.inner_text("#masks")
    nodes = tab.locator("#tree .tree-node")
    assert nodes.count() == 1 + 3 + 6 + 6
    nodes.nth(12).locator("circle").click()
    assert "node 12" in tab.inner_text("#node-info") and "next:" in tab.inner_text("#node-info")
    assert tab.locator("#tree .tree-node.on").count() == 4  # root, child, grandchild, leaf
    shoot(tab, "tree")


def test_a_refusal_gets_a_page(tab: Any, tmp_path: Path) -> None:
    tab.goto(write(tmp_path, "summing", summing).as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    assert tab.inner_text("#verdict") == "refused"
    assert "aten.cumsum mixes tokens" in tab.inner_text("#failure")
    assert tab.locator("#timeline .bar.failed").inner_text().startswith("token locality")
    # every pass that ran, the one that refused last
    names = tab.locator("details.pass > summary > b").all_inner_texts()
    assert names == [
        "normalize",
        "rows apart",
        "every position",
        "choose regime",
        "strip native cache",
        "recognize states",
        "recognize attention",
        "classify",
        "token locality",
    ]


def test_source_lines_cannot_end_the_script() -> None:
    content = {"model": "</script><b>", "failure": None, "passes": [], "nodes": [], "sources": []}
    text = html_of(content)
    assert text.count("</script>") == 2 and "\\u003c/script>" in text
