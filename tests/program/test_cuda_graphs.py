"""CUDA graphs without a GPU: what is padded, recorded, replayed, evicted and dropped, with a recorder that pretends.

The fake graph replays as a real one does: the same launch on the same tensors, into the same output.
"""

from __future__ import annotations

import functools
import gc
import random
from dataclasses import replace

import pytest
import torch
import zoo
from oracles import EAGER, TOLERANCE, assert_rows, error, random_tree
from tree_cases import attention_inputs

from treespec_compiler import Forest, TokenTree, generate, tree_program
from treespec_compiler.errors import CaptureFailed, InvalidOption
from treespec_compiler.ir.registry import kernel_of
from treespec_compiler.options import Options
from treespec_compiler.program import cuda_graphs
from treespec_compiler.program.batch import CallSizes, Part, lay_out
from treespec_compiler.program.cuda_graphs import Graphs, bucket, power_of_two
from treespec_compiler.program.early_exit import EarlyExitProgram, exit_graph
from treespec_compiler.program.executor import Bound, Executor
from treespec_compiler.program.outputs import tapped

VOCAB = zoo.VOCAB
aten = torch.ops.aten


class FakeRecorder:
    """Keeps what a launch was given, as a graph keeps addresses, and launches it again at each replay."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        outputs = [output.clone() for output in run()]

        def replay() -> None:
            for kept, new in zip(outputs, run(), strict=True):
                kept.copy_(new)

        return replay, outputs


def graphs_of(program, **settings):
    """Make a program on the CPU believe that it can be recorded."""
    executor = program._executor
    executor._graphs = Graphs(executor._inputs_of, executor._launch, FakeRecorder(), executor.device, **settings)
    return executor._graphs


REFERENCE = {**EAGER, "kernels": "reference"}


@pytest.fixture(scope="module")
def model():
    return zoo.make("mistral")  # windows, so that padding and depth must be right


@pytest.fixture
def program(model, monkeypatch):
    """Converted once, with fresh recordings for each test."""
    found = tree_program(model, options=REFERENCE)
    found.prefill([1], found.new_cache())  # the first call of a program looks at two trees: not for these counts
    monkeypatch.setattr(found._executor, "options", found.options)
    graphs_of(found)
    return found


def tree(size, seed=0):
    return random_tree(size, VOCAB, seed)


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 64, 65, 256)] == [1, 2, 4, 4, 8, 64, 128, 256]


def test_the_bucket_holds_the_call():
    assert bucket([Part(0, tree(1))]) == CallSizes(1, 1, 1, 1)
    assert bucket([Part(0, tree(5)), Part(2, tree(6)), Part(1, tree(3))]) == CallSizes(16, 4, 16, 1)
    assert bucket([Part(0, tree(70), start=60)]) == CallSizes(16, 1, 16, 2)
    assert bucket([Part(0, tree(200))]) == CallSizes(256, 1, 256, 4)
    assert bucket([Part(0, tree(1025))]) is None
    assert bucket([Part(0, tree(1025), start=1024)]) is None  # more words than any
    assert bucket([Part(s, tree(1)) for s in range(65)]) is None


@pytest.mark.rare
def test_padding_writes_nowhere_and_belongs_to_no_request(program):
    cache = program.new_cache(max_tokens=32, slots=3)
    cache._lengths = [4, 9, 0]
    parts = [Part(1, tree(3)), Part(0, tree(2))]
    room = CallSizes(8, 4, 8, 2)
    sizes, numbers = lay_out(parts, cache, room=room, aligned=True)
    assert sizes == (8, 4, 8, 2, 1, 0) and len(numbers) == room.integers
    batch = room.split(torch.frombuffer(numbers, dtype=torch.int64), aligned=True)
    meta = batch.meta
    assert meta.write_index.tolist() == [41, 42, 43, 4, 5, -1, -1, -1]
    assert meta.node_offsets.tolist() == [0, 3, 5, 5, 5]
    assert meta.prefix_lens.tolist() == [9, 4, 0, 0] and meta.tree_lens.tolist() == [3, 2, 0, 0]
    assert meta.rows.tolist() == list(range(8)) and meta.page_table.shape == (4, 1)
    assert not meta.ancestors[5:].any() and not meta.ancestors[:, 1].any()
    exact = lay_out(parts, cache)
    plain = CallSizes(*exact[0]).split(torch.frombuffer(exact[1], dtype=torch.int64)).meta
    assert torch.equal(meta.ancestors[:5, :1], plain.ancestors)
    assert torch.equal(meta.positions[:5], plain.positions)
    start = batch.tokens.data_ptr()
    assert all((t.data_ptr() - start) % 16 == 0 for t in (*attention_inputs(meta), meta.rows))


def test_replays_read_the_present_call(model, program):
    """Sizes, trees, prefixes and slots change under the same recordings; the eager model is the judge."""
    cache = program.new_cache(max_tokens=64, slots=3)
    prefixes = {}
    for slot in range(3):
        prefixes[slot] = [(5 * i + slot) % VOCAB for i in range(4 + 3 * slot)]
        program.prefill(prefixes[slot], cache, slot)
    untouched = [s.clone() for s in cache.storages]
    chance = random.Random(0)
    for step in range(8):
        slots = chance.sample(range(3), 1 + step % 3)
        trees = {slot: tree(chance.randrange(1, 6), step) for slot in slots}
        rows = program.verify(Forest(trees.items()), cache).split([len(t) for t in trees.values()])
        for (slot, grown), found in zip(trees.items(), rows):
            assert_rows(model, found, grown, prefixes[slot])
        paths = {slot: t.path(chance.randrange(len(t))) for slot, t in trees.items()}
        cache.commit(paths)
        for slot, path in paths.items():
            prefixes[slot] += [trees[slot].tokens[i] for i in path]
    stats = program.graph_stats
    assert stats.replays > 0 and stats.captures == program._executor._graphs.record.recorded == stats.held
    assert stats.replays + stats.launches == 8
    # Padding wrote no K/V: what is behind every slot's tokens is what was there.
    last = cache.max_tokens - 1
    assert all(torch.equal(now[..., last, :], then[..., last, :]) for now, then in zip(cache.storages, untouched))


def test_growing_a_tree_level_by_level(model, program):
    cache = program.new_cache(max_tokens=64)
    prefix = [3, 1, 4]
    program.prefill(prefix, cache)
    for seed in range(3):
        grown = tree(9, seed)
        program.verify(TokenTree(grown.tokens[:4], grown.parents[:4]), cache)
        rows = program.extend(grown, cache, start=4)
        assert_rows(model, rows, grown, prefix, nodes=range(4, 9))
    assert program.graph_stats.captures == 2  # 4 nodes, and 5 padded to 8


def test_a_size_is_recorded_at_its_second_use(program):
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    assert program.graph_stats == cuda_graphs.GraphStats(limit=cuda_graphs.MAX_BUCKETS)
    counts = []
    for _ in range(3):
        program.verify(tree(3), cache)
        stats = program.graph_stats
        counts.append((stats.launches, stats.captures, stats.replays))
    assert counts == [(1, 0, 0), (1, 1, 1), (1, 1, 2)]
    assert "1 of at most 64 CUDA graphs" in repr(program)


def test_larger_than_every_bucket_runs_without(model, program, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_NODES", 4)
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for _ in range(2):
        assert_rows(model, program.verify(tree(5), cache), tree(5), [1, 2, 3])
    assert (program.graph_stats.launches, program.graph_stats.captures) == (2, 0)


def test_the_oldest_size_makes_room(model, program):
    graphs_of(program, limit=2)
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for size in (1, 1, 2, 2, 1, 3, 3, 2):  # 4 (for 3) evicts 2, and 2 evicts 1
        assert_rows(model, program.verify(tree(size), cache), tree(size), [1, 2, 3])
    stats = program.graph_stats
    assert (stats.captures, stats.evicted, stats.held, stats.launches) == (3, 2, 1, 4)


def test_each_cache_has_its_own_and_takes_them_along(model, program):
    first, second = program.new_cache(), program.new_cache()
    for cache, prefix in ((first, [1, 2, 3]), (second, [7, 8])):
        program.prefill(prefix, cache)
        for _ in range(2):
            assert_rows(model, program.verify(tree(3), cache), tree(3), prefix)
    assert program.graph_stats.held == 2
    del first, cache
    gc.collect()
    assert (program.graph_stats.held, program.graph_stats.dropped) == (1, 1)
    assert_rows(model, program.verify(tree(3), second), tree(3), [7, 8])


@pytest.mark.rare
def test_other_weights_end_every_recording_and_another_dtype_the_program_s_graphs():
    model = zoo.make("llama")
    program = tree_program(model, options=REFERENCE)
    graphs_of(program)
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for _ in range(2):
        program.verify(tree(3), cache)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
    cache.free()
    program.prefill([1, 2, 3], cache)
    for _ in range(2):
        assert_rows(model, program.verify(tree(3), cache), tree(3), [1, 2, 3])
    stats = program.graph_stats
    assert (stats.captures, stats.dropped, stats.held) == (2, 1, 1)
    before = program._executor._graphs
    model.double()
    program.refresh()
    assert program._executor._graphs is not before


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_generation_through_recordings(model, program, sampling):
    """Nobody holds logits of an earlier call: every replay of a size writes them again."""
    draft = model_of_one_layer()
    settings = {
        "draft": draft,
        "policy": "best-first:6",
        "max_new_tokens": 20,
        "eos_token_id": (),
        "options": REFERENCE,
    }
    drafting = tree_program(draft, options=REFERENCE)
    program._executor._graphs = drafting._executor._graphs = None
    expected = generate(model, [5, 6, 7, 8], **settings, **sampling).sequences
    for each in (program, drafting):
        graphs_of(each)
    assert torch.equal(generate(model, [5, 6, 7, 8], **settings, **sampling).sequences, expected)
    assert program.graph_stats.replays > 3 and drafting.graph_stats.replays > 10


@functools.cache
def model_of_one_layer():
    return zoo.make("mistral", num_hidden_layers=1)


def test_the_early_exit_is_recorded_as_well(program):
    exit, plain = EarlyExitProgram(program, 1), program.executor(exit_graph(1))
    own = exit._executor()
    own._graphs = Graphs(own._inputs_of, own._launch, FakeRecorder(), exit.device)
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for seed in range(4):
        expected = program.call(lambda: plain, tree(5, seed), cache)[0].clone()
        assert error(exit.verify(tree(5, seed), cache), expected) <= TOLERANCE
    assert exit.graph_stats.captures == 1 and exit.graph_stats.replays == 3


def test_every_named_output_is_replayed(program):
    wanted = ("logits", "hidden:1", "hidden:2")
    own, plain = program.returning(wanted), program.executor(lambda state: tapped(state, ("hidden:1", "hidden:2")))
    own._graphs = Graphs(own._inputs_of, own._launch, FakeRecorder(), program.device)
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for seed in range(4):
        expected = [x.clone() for x in program.call(lambda: plain, tree(5, seed), cache)]
        found = program.verify(tree(5, seed), cache, outputs=wanted)
        for name, value in zip(wanted, expected, strict=True):
            assert found[name].shape == value.shape and error(found[name], value) <= TOLERANCE
    assert own.graph_stats.captures == 1 and own.graph_stats.replays == 3


def failing(run):
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def test_what_cannot_be_recorded_runs_kernel_by_kernel(model, program, caplog):
    program._executor._graphs.record = failing
    cache = program.new_cache()
    program.prefill([1, 2, 3], cache)
    for _ in range(4):
        assert_rows(model, program.verify(tree(3), cache), tree(3), [1, 2, 3])
    assert program.graph_stats.off == "RuntimeError (operation not permitted when stream is capturing)"
    assert [r.name for r in caplog.records] == ["treespec.program.cuda_graphs"]


def test_what_cannot_be_recorded_is_an_error_where_it_was_asked_for(program):
    program._executor.options = Options(cuda_graphs=True)
    program._executor._graphs.record = failing
    cache = program.new_cache()
    program.verify(tree(3), cache)
    with pytest.raises(CaptureFailed, match="not permitted"):
        program.verify(tree(3), cache)


@pytest.mark.rare
def test_the_option(program, monkeypatch):
    program._followed.rebuild(program._model(), "a test")
    assert program.graph_stats.off == "the model is on cpu"
    without = Executor(program.state, Bound({}), Options(cuda_graphs=False))
    assert without.graph_stats.off == "option cuda_graphs=False"
    with pytest.raises(InvalidOption, match=r"cuda_graphs: got True.*the model is on cpu"):
        Executor(program.state, Bound({}), Options(cuda_graphs=True))


def test_kernels_that_wait_for_the_device_are_not_recorded(program, monkeypatch):
    cuda = torch.device("cuda")
    assert "the reference) waits for the device" in cuda_graphs.obstacle(program.graph_module.graph, cuda)
    aten = kernel_of(torch.ops.treespec_aten.tree_attention.default)
    assert aten is not None and not aten.capturable
    monkeypatch.setattr(cuda_graphs, "kernel_of", lambda target: aten)
    assert "(aten) waits" in cuda_graphs.obstacle(program.graph_module.graph, cuda)
    monkeypatch.setattr(cuda_graphs, "kernel_of", lambda target: replace(aten, capturable=True))
    assert cuda_graphs.obstacle(program.graph_module.graph, cuda) == ""


@pytest.mark.parametrize("pools", [False, True], ids=["pools made outside", "pools made inside"])
def test_logits_are_of_the_pools_mode_whoever_calls_first(program, pools):
    """A recording is made at the second use, here inside inference mode; its logits are used outside as well."""
    with torch.inference_mode(pools):
        cache = program.new_cache()
    with torch.inference_mode():
        program.prefill([1, 2, 3], cache)
        for _ in range(2):
            program.verify(tree(3), cache)
    assert program.graph_stats.captures == 1
    with torch.inference_mode(pools):
        logits = program.verify(tree(3), cache)
    assert logits.is_inference() == pools
    if not pools:
        logits.mul_(2.0)  # an inference tensor does not allow it


@pytest.mark.gpu
def test_on_a_gpu(model):
    model = model.cuda()
    program = tree_program(model, options={"cuda_graphs": True})
    plain = tree_program(model, options={"cuda_graphs": False})
    cache, other = program.new_cache(), plain.new_cache()
    for seed in range(6):
        for p, c in ((program, cache), (plain, other)):
            c.free()
            p.prefill([3, 1, 4, 1, 5][: 2 + seed % 3], c)
        grown = tree(3 + seed % 2, seed)
        assert error(program.verify(grown, cache).cpu(), plain.verify(grown, other).cpu()) <= TOLERANCE
    assert program.graph_stats.replays >= 4
