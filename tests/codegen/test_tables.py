"""Tuning tables: the nearest measured shape, whose kernel they are for, and files that are not what they should be."""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from pathlib import Path

import pytest

from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu.tree_attention_source import SHOWN, source
from treespec_compiler.codegen.gpu.tree_attention_spec import DTYPES, AttentionKernel, Config
from treespec_compiler.codegen.tables import TuningEntry, TuningTable
from treespec_compiler.errors import CorruptTable
from treespec_compiler.ir.specs import MaskSpec

KERNELS = ("attend.txt", "merge.txt")
KEY = {"dtype": "bf16", "key_dim": 128, "rows": 16, "capacity": 1024}


def parse(config):
    if config.get("block_m") == 17:
        raise ValueError("a power of two")


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    """Shipped tables, user tables and a kernel in folders of the test's own."""
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setitem(
        tables.OPS, "toy", tables.Tuned(lambda: [(tmp_path / name).read_text() for name in KERNELS], parse)
    )
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    for name in KERNELS:
        (tmp_path / name).write_text("first version")
    tables.forget()
    yield
    tables.forget()


def entry(block, us=1.0, **key):
    return TuningEntry(KEY | key, {"block_m": block}, us)


def write(entries, where=tables.user_path, **changed):
    fields = {"op": "toy", "arch": "sm_90", "source_hash": tables.kernel_hash("toy")} | changed
    path = where("toy", "sm_90")
    tables.write(path, TuningTable(**fields, entries=tuple(entries), meta={"device": "a GPU"}))
    return path


def found(**key):
    config = tables.lookup("toy", "sm_90", KEY | key)
    return config and config["block_m"]


def test_nothing_measured_gives_nothing(caplog):
    assert tables.lookup("toy", "sm_90", KEY) is None
    assert not caplog.records


def test_the_nearest_size_by_ratio():
    write([entry(16, rows=1), entry(32, rows=16), entry(64, rows=64)])
    assert [found(rows=n) for n in (1, 3, 6, 16, 40, 64, 4096)] == [16, 16, 32, 32, 64, 64, 64]
    assert found(rows=17) == 64  # blocks for 16 rows would read everything twice


def test_two_sizes_add_up_and_ties_go_to_the_smaller():
    write([entry(2, rows=64, capacity=1024), entry(1, rows=16, capacity=2048)])
    assert found(rows=16, capacity=1024) == 1  # one octave of capacity against two of rows
    assert found(rows=64, capacity=2048) == 2
    write([entry(2, rows=31), entry(1, rows=7)])
    assert found(rows=15) == 1


def test_fields_that_are_no_sizes_must_be_equal():
    write([entry(16)])
    assert found() == 16
    assert found(dtype="fp16") is None
    assert found(key_dim=64) is None
    assert tables.lookup("toy", "sm_90", KEY | {"window": 8}) is None
    assert tables.lookup("toy", "sm_90", {k: v for k, v in KEY.items() if k != "rows"}) is None
    assert tables.lookup("toy", "sm_80", KEY) is None


def test_the_callers_copy_is_its_own():
    write([entry(16)])
    tables.lookup("toy", "sm_90", KEY)["block_m"] = 5
    assert found() == 16


def test_the_users_table_lies_over_the_shipped_one():
    write([entry(16, rows=1), entry(32, rows=64)], tables.shipped_path)
    assert found(rows=1) == 16
    write([entry(128, rows=1)])
    assert (found(rows=1), found(rows=64)) == (128, 32)


def test_another_source_of_the_kernel_makes_the_table_void(tmp_path, caplog):
    path = write([entry(16)])
    assert found() == 16
    (tmp_path / KERNELS[1]).write_text("scores in another way")
    tables.forget()
    assert found() is None and found(rows=3) is None
    assert len(caplog.records) == 1 and str(path) in caplog.text and "treespec tune" in caplog.text


GOOD = json.dumps({"key": KEY, "config": {"block_m": 16}, "us": 2.0})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "a list"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "meta": {}, "entries": []}', "no meta.source_hash"),
        ('{"schema": 1, "meta": META, "entries": {}}', "entries of type dict"),
        ('{"schema": 1, "meta": META, "entries": [GOOD, {}]}', "an entry without 'key'"),
        ('{"schema": 1, "meta": META, "entries": [GOOD, 7]}', "an entry without"),
        ('{"schema": 1, "meta": META, "entries": [{"key": {}, "config": {"block_m": "16"}, "us": 1}]}', "the entry"),
        ('{"schema": 1, "meta": META, "entries": [{"key": {}, "config": {"block_m": 16}, "us": 0}]}', "the entry"),
        ('{"schema": 1, "meta": META, "entries": [{"key": {"rows": "x"}, "config": {"a": 1}, "us": 1}]}', "an entry"),
        ('{"schema": 1, "meta": META, "entries": [{"key": {}, "config": {"block_m": 17}, "us": 1}]}', "block_m': 17"),
        ('{"schema": 1, "meta": OTHER, "entries": [GOOD]}', "a table for toy on sm_80"),
    ],
)
def test_corrupt_and_foreign_tables_are_named_and_ignored(text, problem, caplog):
    meta = {"op": "toy", "arch": "sm_90", "source_hash": tables.kernel_hash("toy")}
    text = text.replace("META", json.dumps(meta)).replace("OTHER", json.dumps(meta | {"arch": "sm_80"}))
    write([entry(32)], tables.shipped_path)
    path = tables.user_path("toy", "sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("GOOD", GOOD))
    with pytest.raises(CorruptTable, match=problem):
        tables.read(path, "toy", "sm_90")
    with caplog.at_level(logging.WARNING):
        assert [found(rows=n) for n in (1, 2, 3)] == [32, 32, 32]  # what is shipped still holds
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and problem in caplog.text and "ignored" in caplog.text


def test_what_is_written_is_read_again_one_line_an_entry():
    runner_up = {"config": {"block_m": 64}, "us": 2.5}
    first = TuningEntry(KEY, {"block_m": 32, "warps": 4}, 2.0, runner_up)
    path = write([first, entry(16, rows=1)])
    table = tables.read(path, "toy", "sm_90")
    assert table.entries == (first, entry(16, rows=1)) and table.meta == {"device": "a GPU"}
    assert sum('"key"' in line for line in path.read_text().splitlines()) == 2
    assert tables.read(write([]), "toy", "sm_90").entries == ()


def test_merging_replaces_entries_of_the_same_key():
    table = TuningTable("toy", "sm_90", "h", (entry(16), entry(32, rows=64)))
    merged = tables.merge(table, [entry(128)])
    assert [e.config["block_m"] for e in merged.entries] == [128, 32]


def test_writers_at_once_leave_a_whole_table_and_no_other_file():
    def many(block):
        for _ in range(30):
            write([entry(block, rows=n) for n in range(1, 40)])

    writers = [threading.Thread(target=many, args=(b,)) for b in (16, 32, 64)]
    for writer in writers:
        writer.start()
    path = tables.user_path("toy", "sm_90")
    while any(w.is_alive() for w in writers):
        if path.exists():
            assert len({e.config["block_m"] for e in tables.read(path, "toy", "sm_90").entries}) == 1
    assert [p.name for p in path.parent.iterdir()] == ["sm_90.json"]


def unusable(path):
    """Why nobody can use a table; empty: it is of the kernel as it is."""
    table = tables.read(path, path.parent.name, path.stem)
    return "" if table.source_hash == tables.kernel_hash(table.op) else f"{path} is of another kernel"


def test_shipped_tables_fit_the_shipped_kernels(tmp_path):
    assert not unusable(write([entry(16)], tables.shipped_path))
    assert "of another kernel" in unusable(write([entry(16)], tables.shipped_path, source_hash="0"))
    shipped = [path for path in Path(tables.__file__).with_name("tables").rglob("*.json") if unusable(path)]
    assert not shipped


def test_the_identity_is_the_text_and_not_how_it_is_made(tmp_path):
    before = tables.kernel_hash("toy")
    (tmp_path / "note.txt").write_text("a file that no kernel's text comes from")
    tables.forget()
    assert tables.kernel_hash("toy") == before
    (tmp_path / KERNELS[0]).write_text("second version")
    tables.forget()
    assert tables.kernel_hash("toy") != before


def test_every_line_a_kernel_can_have_is_in_its_identity():
    """A line without its numbers: of any spec it occurs in those that the hash is made of."""

    def lines(spec):
        return {re.sub(r"\d+(\.\d+)?", "#", line) for line in source(spec).splitlines()}

    shown = set().union(*map(lines, SHOWN))
    masks, scores = (
        [(0, 0), (7, 0), (0, 16), (7, 16)],
        [{}, {"softcap": 2.0}, {"slopes": True}, {"bias": True}, {"sinks": True}],
    )
    for mask, score, dtype, dims in itertools.product(masks, scores, DTYPES, [(64, 64), (80, 128)]):
        spec = AttentionKernel(4, 2, *dims, dtype, dtype, MaskSpec(mask[0], None, mask[1]), **score)
        assert {line for line in lines(spec) - shown if not line.startswith(("mask:", "score:"))} == set()


GOOD_CONFIG = Config(16, 32, 4, 2).as_dict()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"block_m": 17}, "powers of two, blocks from 16 to 256"),
        ({"block_m": 8}, "powers of two, blocks from 16 to 256"),
        ({"block_n": 512}, "powers of two, blocks from 16 to 256"),
        ({"block_m": -16}, "powers of two, blocks from 16 to 256"),
        ({"num_warps": 5}, "powers of two, blocks from 16 to 256"),
        ({"num_warps": 64}, "at most 32 warps, and 1 to 8 stages"),
        ({"num_stages": 0}, "at most 32 warps, and 1 to 8 stages"),
        ({"split": 3}, "block_m block_n num_warps num_stages"),
        ({"num_stages": None}, "block_m block_n num_warps num_stages"),
    ],
)
def test_numbers_that_are_no_configuration(changed, expected):
    assert Config.parse(GOOD_CONFIG) == Config(16, 32, 4, 2)
    numbers = {name: n for name, n in (GOOD_CONFIG | changed).items() if n is not None}
    with pytest.raises(ValueError, match=expected):
        Config.parse(numbers)
