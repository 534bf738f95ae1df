"""Tuning without a GPU: what is compiled and left out, what is timed, what a table keeps; times are made up."""

from __future__ import annotations

import dataclasses
import logging
import math
import os

import pytest
import torch
from tuning_cases import EMPTY, microseconds

from treespec_compiler.cli import tune_kernels as cli
from treespec_compiler.codegen import tables
from treespec_compiler.codegen.gpu import tune as tuning
from treespec_compiler.codegen.gpu.offline import Resources
from treespec_compiler.codegen.gpu.tree_attention_spec import AttentionKernel, Config, default_config, search_space
from treespec_compiler.codegen.gpu.trial import Workload
from treespec_compiler.codegen.gpu.tune import Tuner, candidates, prune, tune
from treespec_compiler.codegen.tables import TuningTable
from treespec_compiler.errors import CorruptTable, InvalidOption
from treespec_compiler.ir.specs import MaskSpec

SPEC = AttentionKernel(32, 8, 128, 128, torch.bfloat16, torch.bfloat16)
SHORT, LONG = Workload(1, 1, 1024), Workload(64, 1, 8192)


class Compiled:
    """A kernel of these resources, with these instructions."""

    def __init__(self, registers=100, stack=0, shared=1000, instructions=("HMMA", "HGMMA")):
        self.resources = Resources(registers, stack, shared, 227 * 1024)
        self.instructions = instructions

    def has(self, name):
        return name in self.instructions


def fine(spec, config, target):
    return Compiled()


def make(**changes):
    fields = {"check": lambda c, s: 1e-3, "measure": microseconds, "compiler": fine, "limit": 6, **changes}
    return Tuner(SPEC, "sm_90", **fields)


def test_shapes():
    assert Workload.parse("64x8x2048") == Workload(64, 8, 2048) and str(Workload(64, 8, 2048)) == "64x8x2048"
    for text in ("64", "64x8", "0x1x5", "axbxc", "1x2x3x4", "-1x1x1"):
        with pytest.raises(InvalidOption, match=f"got '{text}'"):
            Workload.parse(text)


def test_candidates_begin_with_the_default_and_fit_the_rows():
    found = candidates(SPEC, 4, "sm_90")
    assert found[0] == default_config(SPEC, 4, "sm_90")
    assert len(found) == len(set(found)) and set(found) <= {*search_space(SPEC), found[0]}
    assert max(c.block_m for c in found) == 32  # 4 rows fill no larger block
    assert max(c.block_m for c in candidates(SPEC, 256, "sm_90")) == 128
    assert candidates(SPEC, 4, "sm_90", limit=3) == found[:3]


def test_pruning_gives_reasons():
    def compiler(spec, config, target):
        if config.num_stages == 4:
            raise RuntimeError("out of registers")
        if config.num_warps == 8:
            return Compiled(stack=64)
        if config.block_n == 128:
            return Compiled(shared=300_000)
        return Compiled(instructions=("HMMA",))

    configs = [Config(16, 64, 4, 4), Config(16, 64, 8, 2), Config(16, 128, 4, 2), Config(64, 64, 4, 2)]
    found = prune(SPEC, [*configs, Config(16, 64, 4, 2)], "sm_90", compiler)
    assert found.kept == [Config(16, 64, 4, 2)]  # 16 rows do without warp group products
    assert [found.rejected[c] for c in configs] == [
        "does not compile (RuntimeError)",
        "spills (64 bytes of stack)",
        "shared memory (300000 bytes of 232448)",
        "no HGMMA",
    ]
    single = dataclasses.replace(SPEC, dtype=torch.float32, pool_dtype=torch.float32)
    assert prune(single, configs[3:], "sm_90", lambda *a: Compiled(instructions=())).kept == configs[3:]


@pytest.mark.rare
def test_pruning_of_the_real_kernel():
    pytest.importorskip("triton", reason="needs triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET makes no kernels to compile")
    spec = AttentionKernel(8, 2, 64, 64, torch.float16, torch.float16)
    found = prune(spec, [Config(16, 64, 4, 2), Config(64, 64, 4, 2), Config(128, 128, 8, 9)], "sm_90")
    assert found.kept == [Config(16, 64, 4, 2), Config(64, 64, 4, 2)]
    assert "shared memory" in found.rejected[Config(128, 128, 8, 9)]


def test_the_fastest_and_the_second():
    entry = make(limit=None).entry(SHORT)
    ordered = sorted(candidates(SPEC, 4, "sm_90"), key=lambda c: microseconds(c, SHORT))
    assert entry.config == ordered[0].as_dict() and entry.us == microseconds(ordered[0], SHORT)
    assert entry.runner_up == {"config": ordered[1].as_dict(), "us": round(microseconds(ordered[1], SHORT), 3)}
    assert entry.key == SPEC.tuning_key(1, 1, 1024 + 64)


def test_wrong_configurations_are_never_timed(caplog):
    right = candidates(SPEC, 4, "sm_90")[2]
    timed = []

    def check(config, shape):
        if config.num_warps == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 1e-3 if config == right else math.nan if config.num_stages == 2 else 0.5

    def measure(config, shape):
        timed.append(config)
        return 1.0

    with caplog.at_level(logging.WARNING):
        entry = make(check=check, measure=measure, limit=None).entry(SHORT)
    assert timed == [right] and entry.config == right.as_dict() and entry.runner_up is None
    assert "an error of nan" in caplog.text and "an error of 5.0e-01" in caplog.text
    with pytest.raises(InvalidOption, match=r"got '1x1x1024', expected one that .*an error of 9\.0e"):
        make(check=lambda c, s: 9.0).entry(SHORT)


def test_each_configuration_is_compiled_once():
    made = []

    def compiler(spec, config, target):
        made.append(config)
        return Compiled()

    tuner = make(compiler=compiler, limit=4)
    tuner.entry(SHORT)
    tuner.entry(Workload(2, 1, 8192))  # its default is the same one
    assert len(made) == len(set(made)) and set(candidates(SPEC, 4, "sm_90", 4)) <= set(made)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "sm_90.json"

    def save(table):
        tables.write(path, table)

    def stop(config, shape):
        if shape == LONG:
            raise KeyboardInterrupt
        return microseconds(config, shape)

    with pytest.raises(KeyboardInterrupt):
        tune(make(measure=stop), [SHORT, LONG], EMPTY, save)
    half = tables.read(path, tuning.OP, "sm_90")
    assert len(half.entries) == 1
    seen = []
    whole = tune(make(), [SHORT, LONG], half, save, on_shape=seen.append)
    assert [(o.shape, o.entry is None, o.why) for o in seen] == [(SHORT, True, ""), (LONG, False, "")]
    assert tables.read(path, tuning.OP, "sm_90").entries == whole.entries and len(whole.entries) == 2
    again = tune(make(measure=lambda c, s: 1.0), [SHORT], whole, save, again=True)
    assert [e.us for e in again.entries] == [1.0, whole.entries[1].us]


def test_a_shape_that_nothing_is_right_for_is_left_out(caplog):
    saved, seen = [], []

    def check(config, shape):
        return 9.0 if shape == SHORT else 1e-3

    with caplog.at_level(logging.WARNING):
        table = tune(make(check=check), [SHORT, LONG], EMPTY, saved.append, on_shape=seen.append)
    assert len(table.entries) == 1 and saved == [table]
    left, done = seen
    assert left.entry is None and left.why == "an error of 9.0e+00"
    assert done.entry == table.entries[0] and not done.why
    assert "1x1x1024 of 32/8/128 is left out: an error of 9.0e+00" in caplog.messages
    # The next run tries it again, and only it.
    seen.clear()
    assert len(tune(make(), [SHORT, LONG], table, saved.append, on_shape=seen.append).entries) == 2
    assert [(o.shape, o.entry is None) for o in seen] == [(SHORT, False), (LONG, True)]


def test_no_error_of_a_launch_ends_a_run():
    class OutOfResources(Exception):  # triton's is no RuntimeError
        pass

    def check(config, shape):
        if config != default_config(SPEC, 4, "sm_90"):
            raise OutOfResources("shared memory")
        return 1e-3

    assert make(check=check).entry(SHORT).config == default_config(SPEC, 4, "sm_90").as_dict()


def test_a_reason_is_short():
    errors = iter(range(1, 100))
    why = make(check=lambda c, s: float(next(errors)), limit=None).find(SHORT)
    assert why.startswith("an error of 1.0e+00; ") and why.endswith(" more") and why.count(";") == 4
    assert make(compiler=lambda *_: Compiled(stack=8)).find(SHORT) == "spills (8 bytes of stack)"


def test_names_of_outcomes():
    window = dataclasses.replace(SPEC, value_dim=64, mask=MaskSpec(4096))
    assert tuning.Outcome(window, LONG).name == "64x1x8192 of 32/8/128+64w4096"


def test_what_was_tuned_is_what_is_launched(tmp_path, monkeypatch):
    from treespec_compiler.codegen.gpu.inventory import chosen_config

    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "none")
    tables.forget()
    assert chosen_config(SPEC, 1, "sm_90") == (default_config(SPEC, 4, "sm_90"), False)
    table = TuningTable(tuning.OP, "sm_90", tables.kernel_hash(tuning.OP), ())
    path = tables.user_path(tuning.OP, "sm_90")
    table = tune(make(), [SHORT], table, lambda t: tables.write(path, t))
    config, measured = chosen_config(SPEC, 1, "sm_90")
    assert measured and config.as_dict() == table.entries[0].config != default_config(SPEC, 4, "sm_90").as_dict()

    from treespec_compiler.codegen.gpu.tree_attention import _config

    monkeypatch.setattr(tables, "architecture", lambda device: "sm_90")
    batch = Workload(8, 4, 2048)
    table = tune(make(measure=lambda c, s: c.block_n), [batch], table, lambda t: tables.write(path, t))
    launched = _config.__wrapped__(SPEC, 8 * 4, 4, batch.capacity, 0, False)  # an op sees the nodes of all requests
    assert launched.as_dict() == table.entries[-1].config != config.as_dict()
    prompt = default_config(SPEC, 2048 * SPEC.group, "sm_90")  # what trees were measured with says nothing about it
    assert _config.__wrapped__(SPEC, 2048, 1, 4096, 0, True) == prompt
    assert chosen_config(SPEC, 2048, "sm_90", chain=True) == (prompt, False)
    tables.forget()


def test_a_table_of_another_kernel_is_begun_anew(tmp_path):
    path = tmp_path / "sm_90.json"
    assert tables.resumed(path, EMPTY) == EMPTY
    table = tune(make(), [SHORT], EMPTY, lambda t: tables.write(path, t))
    assert tables.resumed(path, EMPTY).entries == table.entries
    assert tables.resumed(path, dataclasses.replace(EMPTY, source_hash="other")).entries == ()
    path.write_text("{")
    with pytest.raises(CorruptTable, match="Delete the file"):
        tables.resumed(path, EMPTY)


def test_a_table_names_every_device_it_was_measured_on(tmp_path):
    path, table = tmp_path / "sm_90.json", EMPTY
    for device, shape in (("H100", SHORT), ("H200", LONG), ("H100", LONG)):
        here = dataclasses.replace(EMPTY, meta={"device": device, "versions": {"triton": device}})
        table = tune(make(), [shape], tables.resumed(path, here), lambda t: tables.write(path, t))
    assert table.meta == {"device": "H100, H200", "versions": {"triton": "H100"}} and len(table.entries) == 2


def test_corrupt_tables_name_the_command_that_makes_them_again():
    kernels = str(CorruptTable(path="/cache/tables/tree_attention/sm_90.json", problem="a list"))
    assert kernels.startswith("Corrupt tuning table /cache/") and "`treespec tune MODEL --device cuda`" in kernels
    passes = str(CorruptTable(path="/cache/latency/0a1b.json", problem="a list"))
    assert passes.startswith("Corrupt latency table /cache/") and "Delete" not in passes
    assert "`treespec tune --latency --target MODEL`" in passes


def test_a_default_that_is_left_out_is_known():
    default = default_config(SPEC, 4, "sm_90")
    tuner = make(compiler=lambda spec, config, target: Compiled(stack=8 * (config == default)))
    outcome = tuning.Outcome(SPEC, SHORT, tuner.entry(SHORT))
    assert cli.default_left_out(tuner, outcome) == f"spills (8 bytes of stack) with {cli.describe(default.as_dict())}"
    assert cli.default_left_out(tuner, tuning.Outcome(SPEC, SHORT)) == ""  # measured before
    assert cli.default_left_out(make(), outcome) == ""
