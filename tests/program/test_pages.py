"""Paged caches: whose page is whose, what lies there, and that a program on them is the program on whole slots."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from modules import VOCAB, Tiny
from oracles import EAGER, TOLERANCE, assert_rows, eager_row, error, random_tree
from zoo import spread

import treespec_compiler as treespec
from treespec_compiler import Forest, TokenTree
from treespec_compiler.errors import CacheOverflow, InvalidOption, OutOfPages, StaleCache
from treespec_compiler.ir import ops
from treespec_compiler.ir.specs import AttentionSpec, MaskSpec
from treespec_compiler.program.cache import TreeCache
from treespec_compiler.program.pages import Pages

SPEC = AttentionSpec(0, "a", "", "", 1, 1, 1, 1, 1.0, MaskSpec(), torch.float32)
CHAIN = TokenTree.chain


class Slots:
    """A cache whose keys are the tokens themselves, and what every slot must hold."""

    def __init__(self, slots: int, pages: int, size: int, max_tokens: int = 60) -> None:
        self.cache = TreeCache([SPEC], max_tokens, slots, torch.device("cpu"), ops.commit_path, size, pages)
        self.texts: list[list[int]] = [[] for _ in range(slots)]

    def write(self, slot: int, tree: TokenTree) -> None:
        self.cache._reserve(slot, len(tree))
        flat = self.cache.pools[0].view(-1)
        for place, token in zip(self.cache._places(slot, range(len(tree))), tree.tokens, strict=True):
            flat[place] = float(token)
        self.cache._trees[slot] = tree

    def prompt(self, slot: int, tokens: list[int]) -> None:
        self.write(slot, CHAIN(tokens))
        self.cache._append(slot, tokens)
        self.texts[slot] += tokens

    def step(self, slot: int, tree: TokenTree, node: int) -> None:
        self.write(slot, tree)
        path = tree.path(node) if node >= 0 else []
        self.cache.commit({slot: path})
        self.texts[slot] += [tree.tokens[i] for i in path]

    def free(self, slot: int) -> None:
        self.cache.free(slot)
        self.texts[slot] = []

    def check(self, contents: bool = True) -> None:
        cache, pages, size = self.cache, self.cache._pages, self.cache.page_size
        assert pages is not None
        held = Counter(page for table in cache._tables for page in table)
        assert [held[page] for page in range(pages.count)] == pages._holders
        assert sorted([*held, *pages._blank, *pages._idle]) == list(range(pages.count))
        assert cache.page_counts.shared == sum(n > 1 for n in held.values())
        assert len(pages._page_of) == sum(block is not None for block in pages._block_of)
        assert all(pages._block_of[page] == block for block, page in pages._page_of.items())
        flat = cache.pools[0].view(-1) if contents else None
        for slot, text in enumerate(self.texts):
            table = cache._tables[slot]
            assert cache.length(slot) == len(text) and cache._tokens[slot] == text
            assert len(table) * size >= len(text) and cache._known[slot] == len(text) // size
            if flat is not None:
                assert [int(flat[table[n // size] * size + n % size]) for n in range(len(text))] == text


def test_ten_thousand_operations_leak_no_page_and_lose_no_token():
    chance = random.Random(0)
    slots = Slots(slots=6, pages=17, size=4)
    cache, seen = slots.cache, Counter[str]()
    texts = [[chance.randrange(3) for _ in range(40)] for _ in range(3)]  # beginnings that slots have in common
    for turn in range(10_000):
        slot = chance.randrange(6)
        what = chance.choice(["prompt", "adopt", "step", "step", "grow", "free", "copy", "outdate"])
        before = [list(text) for text in slots.texts]
        try:
            if what == "prompt":
                slots.prompt(slot, chance.choice(texts)[: chance.randrange(1, 20)])
            elif what == "adopt" and not slots.texts[slot]:
                cache.free(slot)
                text = chance.choice(texts)[: chance.randrange(1, 30)]
                found = cache.adopt(slot, text)
                assert found < len(text)
                slots.texts[slot] = text[:found]
                seen["adopted"] += found > 0
                seen["begun"] += found % 4 > 0
            elif what == "step":
                tree = random_tree(chance.randrange(1, 12), 3, turn)
                slots.step(slot, tree, chance.randrange(-1, len(tree)))
            elif what == "grow":
                slots.write(slot, random_tree(chance.randrange(1, 12), 3, turn))
            elif what == "free":
                slots.free(slot)
            elif what == "copy":
                other = chance.randrange(6)
                slots.free(slot)
                text = [*slots.texts[other], 0]
                found = cache.adopt(slot, text)
                assert found == len(slots.texts[other]) or other == slot
                slots.texts[slot] = text[:found]
            elif turn % 50 == 0:
                cache._outdate("a test")
                for each in range(6):
                    slots.free(each)
        except (OutOfPages, CacheOverflow) as error:
            seen[type(error).__name__] += 1
            slots.texts[slot] = before[slot]
        seen["shared"] = max(seen["shared"], cache.page_counts.shared)
        slots.check(contents=turn % 10 == 0)
    for slot in range(6):
        slots.free(slot)
    assert cache.page_counts.free == 17 and cache.page_counts.held == cache.page_counts.shared == 0
    assert min(seen["adopted"], seen["begun"], seen["OutOfPages"]) > 100 and seen["shared"] > 3


def test_pages_are_shared_when_beginnings_are():
    slots = Slots(slots=3, pages=9, size=4)
    slots.prompt(0, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert slots.cache.adopt(1, [1, 2, 3, 4, 5, 6, 7, 8]) == 7  # the last token is run, for its logits
    slots.texts[1] = [1, 2, 3, 4, 5, 6, 7]
    slots.prompt(1, [8])  # becomes the block that slot 0 has: one page of the two is kept
    assert slots.cache._tables[1] == slots.cache._tables[0][:2]
    assert slots.cache.page_counts.shared == 2 and slots.cache.page_counts.held == 3
    assert slots.cache.adopt(2, [2, 2, 3, 4, 5, 6]) == 0
    slots.free(0), slots.free(1)
    assert slots.cache.page_counts.idle == 2
    assert slots.cache.adopt(2, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8  # of former slots, too
    slots.texts[2] = [1, 2, 3, 4, 5, 6, 7, 8]
    slots.check()


def test_a_page_is_copied_when_it_is_written_to():
    slots = Slots(slots=3, pages=6, size=4)
    slots.prompt(0, [1, 2, 3, 4, 5, 6])
    for target in (1, 2):
        assert slots.cache.adopt(target, [1, 2, 3, 4, 5, 6, 0]) == 6
        slots.texts[target] = list(slots.texts[0])
    assert slots.cache.page_counts.held == 2 and slots.cache.lacking(1, 1) == 1 and slots.cache.lacking(1, 0) == 0
    slots.prompt(1, [7, 8])
    slots.prompt(2, [9])
    slots.step(0, TokenTree([4, 5, 6], [-1, -1, 1]), 2)
    assert [text[6:] for text in slots.texts] == [[5, 6], [7, 8], [9]]
    slots.check()
    assert slots.cache.page_counts.held == 4


def test_the_page_let_go_longest_ago_is_taken_first():
    pages = Pages(3, 2)
    first, second = pages.take(), pages.take()
    pages.know(first, 0, [1, 2])
    pages.know(second, 0, [3, 4])
    pages.drop(second), pages.drop(first)
    assert pages.take() == 2  # nothing is known of it
    assert pages.take() == second and pages.find(0, [3, 4]) is None and pages.find(0, [1, 2]) == first
    pages.hold(first)
    with pytest.raises(OutOfPages, match=r"out of pages: got 1 wanted, expected at most the 0 free ones of 3"):
        pages.take()


def test_what_a_paged_cache_refuses():
    slots = Slots(slots=2, pages=2, size=4, max_tokens=30)
    slots.prompt(0, [1, 2, 3])
    with pytest.raises(OutOfPages, match="got 2 wanted, expected at most the 1 free ones"):
        slots.cache._reserve(0, 8)
    with pytest.raises(CacheOverflow):
        slots.cache._reserve(0, 28)
    assert slots.cache.adopt(0, [1, 2, 3, 4]) == 0  # it is not empty
    slots.check()
    whole = TreeCache([SPEC], 8, 2, torch.device("cpu"), ops.commit_path)
    assert whole.adopt(0, [1, 2, 3]) == 0 and whole.lacking(0, 8) == 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return spread(Tiny())


@pytest.fixture(scope="module")
def program(model):
    return treespec.tree_program(model, options=EAGER)


@pytest.mark.parametrize(("size", "pages"), [(0, None), (-3, None), (True, None), (4, 0), (None, 3)])
def test_sizes_are_checked(program, size, pages):
    with pytest.raises(InvalidOption, match=r"pages?"):
        program.new_cache(32, page_size=size, pages=pages)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_every_row_is_the_models_on_pages_too(model, program, size):
    """Random prompts that others have begun with, forests, commits and frees; the eager model is the judge."""
    cache = program.new_cache(max_tokens=60, slots=4, page_size=size, pages=130 // size)
    chance, texts = random.Random(size), [[] for _ in range(4)]
    common = [chance.randrange(VOCAB) for _ in range(20)]
    for turn in range(40):
        for slot in range(4):
            if len(texts[slot]) > 25 or (texts[slot] and chance.random() < 0.1):
                cache.free(slot)
                texts[slot] = []
            if not texts[slot]:
                prompt = common[: chance.randrange(5, 18)]
                if turn % 3 == 0 and texts[slot - 1]:
                    prompt = [*texts[slot - 1], 1]
                found = cache.adopt(slot, prompt)
                row = program.prefill(prompt[found:], cache, slot)
                assert error(row, eager_row(model, prompt)) <= TOLERANCE
                texts[slot] = list(prompt)
        grown = {slot: random_tree(chance.randrange(1, 8), VOCAB, turn + slot) for slot in chance.sample(range(4), 2)}
        found = program.verify(Forest(grown.items()), cache).split([len(tree) for tree in grown.values()])
        for (slot, tree), rows in zip(grown.items(), found, strict=True):
            assert_rows(model, rows, tree, texts[slot])
        paths = {slot: tree.path(chance.randrange(len(tree))) for slot, tree in grown.items()}
        cache.commit(paths)
        for slot, path in paths.items():
            texts[slot] += [grown[slot].tokens[i] for i in path]
    assert cache.page_counts.total == 130 // size


def test_prompts_run_in_the_forest_of_others_trees(model, program):
    cache = program.new_cache(max_tokens=60, slots=3, page_size=4)
    program.prefill([3, 1, 4], cache, 0)
    program.prefill([1, 5], cache, 2)
    tree, chain = random_tree(6, VOCAB, 1), CHAIN([9, 2, 6])
    found = program.mixed([(0, tree, 0), (2, chain, 0)], [(1, [2, 7, 1, 8, 2])], cache)
    assert_rows(model, found[0], tree, [3, 1, 4])
    assert_rows(model, found[1], chain, [1, 5])
    assert error(found[2], eager_row(model, [2, 7, 1, 8, 2])) <= TOLERANCE
    assert [cache.length(slot) for slot in range(3)] == [3, 5, 2] and cache.uncommitted(0) is tree
    cache.commit({0: tree.path(5), 2: [0]})
    prefix = [3, 1, 4, *tree.path_tokens(5)]
    # without branches nothing needs ancestor words
    found = program.mixed([(0, CHAIN([5]), 0)], [(1, [8, 1, 8]), (2, [4])], cache)
    assert_rows(model, found[0], CHAIN([5]), prefix)
    assert error(found[1], eager_row(model, [2, 7, 1, 8, 2, 8, 1, 8])) <= TOLERANCE
    assert error(found[2], eager_row(model, [1, 5, 9, 4])) <= TOLERANCE
    grown = TokenTree([5, 6, 7], [-1, 0, 0])
    (found,) = program.mixed([(0, grown, 1)], [], cache)
    assert_rows(model, found, grown, prefix, nodes=[1, 2])


@pytest.mark.rare
@pytest.mark.converts
@pytest.mark.slow
def test_inductor_compiles_once_for_every_page_size():
    judge = spread(Tiny())
    program = treespec.tree_program(judge)
    whole = program.new_cache(40)
    tree, counts = random_tree(7, VOCAB, 3), set()
    for cache in (whole, *(program.new_cache(40, page_size=size) for size in (1, 4, 64))):
        program.prefill([3, 1, 4, 1, 5, 9], cache)
        assert_rows(judge, program.verify(tree, cache), tree, [3, 1, 4, 1, 5, 9])
        counts.add(program.compile_count)
    assert len(counts) == 1


def test_other_weights_outdate_pages(model, program):
    cache = program.new_cache(max_tokens=40, slots=2, page_size=4)
    program.prefill([1, 2, 3, 4, 5], cache)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    program.refresh()
    with pytest.raises(StaleCache):
        program.verify(CHAIN([1]), cache)
    assert cache.adopt(1, [1, 2, 3, 4, 5]) == 0  # not known any more
    cache.free(0)
    row = program.prefill([1, 2, 3, 4, 5], cache)
    assert error(row, eager_row(model, [1, 2, 3, 4, 5])) <= TOLERANCE
    assert cache.adopt(1, [1, 2, 3, 4, 5]) == 4
