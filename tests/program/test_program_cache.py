"""Programs saved by one process and found by another: taken where everything that a proof read is the same, never
where anything differs, and given up where they turn out to be wrong.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_decodes
from safetensors import safe_open
from safetensors.torch import save_file
from saved_model import module_of
from torch import Tensor, nn

import treespec_compiler as treespec
from treespec_compiler import pipeline
from treespec_compiler.capture.python_state import PythonState, Undigested
from treespec_compiler.errors import InvalidOption, Unsupported
from treespec_compiler.ir import ops, registry
from treespec_compiler.options import Options
from treespec_compiler.program import machine
from treespec_compiler.program.saved import programs, store
from treespec_compiler.program.tree_program import TreeProgram

VOCAB = 64
LOGGER = "treespec.program"


class Home:
    """A folder of programs, and one that the model's text lies in."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.programs, self.text = folder / "programs", text

    def model(self, *changes: tuple[str, str], seed: int = 0, **config: Any) -> Any:
        module = module_of(self.text, *changes)
        torch.manual_seed(seed)
        return module.Decoder(module.Config(**config)).eval()

    def program(self, model: nn.Module, **options: Any) -> TreeProgram:
        return treespec.tree_program(
            model, options={"lowering": "eager", "program_cache": str(self.programs)} | options
        )

    def right(self, model: nn.Module, **options: Any) -> TreeProgram:
        """The program, which says what the model says."""
        found = self.program(model, **options)
        assert_decodes(model, found, VOCAB, rounds=1)
        return found

    @property
    def files(self) -> list[Path]:
        return sorted(self.programs.glob("*.program"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model's text lies: a program of another file is another one."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def home(tmp_path: Path, text: Path) -> Home:
    return Home(tmp_path, text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The saved program of the model as it is."""
    home = Home(tmp_path_factory.mktemp("written"), text)
    assert not home.right(home.model()).from_cache
    (path,) = home.files
    return path


@pytest.fixture
def saved(home: Home, written: Path) -> Home:
    home.programs.mkdir()
    shutil.copy(written, home.programs)
    return home


def rows(program: TreeProgram) -> Tensor:
    cache = program.new_cache(64)
    program.prefill([1, 2, 3, 4, 5], cache)
    return program.verify(treespec.TokenTree([5, 6, 7, 8], [-1, 0, 0, 1]), cache).clone()


def test_the_second_one_is_found(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved.program(saved.model())
    cold = saved.program(saved.model(), program_cache=False)
    monkeypatch.setattr(pipeline, "convert", None)
    found = saved.right(saved.model())
    assert found.from_cache and first.from_cache and not cold.from_cache
    assert torch.equal(rows(found), rows(cold))
    for name in ("sites", "limits", "max_context", "input_vocab", "vocab_size", "dtype"):
        assert getattr(found, name) == getattr(cold, name), name
    assert [r.name for r in found.history] == [r.name for r in cold.history]
    assert found.graph_module.code == cold.graph_module.code
    assert found.comparison is not None and cold.comparison is not None
    assert 33 < found.comparison.tokens < cold.comparison.tokens and found.comparison.rows == cold.comparison.rows


def test_stats_say_where_the_program_came_from(saved: Home) -> None:
    options = {"lowering": "eager", "program_cache": str(saved.programs)}
    ids = torch.tensor([[1, 2, 3]])
    found, cold = (
        treespec.generate(saved.model(), ids, max_new_tokens=8, options=each)
        for each in (options, options | {"program_cache": False})
    )
    assert found.stats.program_from_cache and not cold.stats.program_from_cache
    assert found.stats.as_dict()["program_from_cache"]
    assert torch.equal(found.sequences, cold.sequences)


def test_other_weights_are_no_other_program(saved: Home) -> None:
    assert saved.right(saved.model(seed=1)).from_cache


TEXTS = {
    "a line of forward": ("x = x + self.attention(self.norm(x)) * self.config.scale", "x = x + self.attention(x)"),
    "a number in forward": ("return self.head(x)", "return self.head(x * 2.0)"),
    "a function that forward calls": ("return F.silu(x)", "return F.relu(x)"),
    "an inner function": ("return x * factor", "return x * factor + 0.5"),
    "a method": ("return 1.0\n", "return 0.5\n"),
    "a value of the class": ("depth = 1.0", "depth = 0.5"),
    "a global number": ("TEMPERATURE = 1.0", "TEMPERATURE = 2.0"),
    "a value in a closure": ("self.after = scaled(1.0)", "self.after = scaled(2.0)"),
    "another mask in a buffer": ("torch.bool).tril())", "torch.bool).tril().triu(-4))"),
    "a dictionary": ('"silu": activation', '"silu": F.tanh'),
    "an attribute": ("self.factor = 1.0", "self.factor = 0.5"),
    "its type": ("self.factor = 1.0", "self.factor = 1"),
    "a default of the configuration": ("scale=1.0", "scale=0.5"),
    "an activation of torch's": ('self.act = "silu"', 'self.act = "gelu"'),
}


@pytest.mark.family
@pytest.mark.parametrize("name", TEXTS)
def test_other_code_is_another_program(saved: Home, name: str) -> None:
    assert not saved.right(saved.model(TEXTS[name])).from_cache


def hooked(model: Any) -> None:
    model.layers[0].register_forward_hook(lambda module, args, output: output * 0.5)


def hooked_before(model: Any) -> None:
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Adapter(nn.Module):
    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.of, self.more = of, nn.Linear(of.in_features, of.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x) + self.more(x)


def adapted(model: Any) -> None:
    model.layers[0].up = Adapter(model.layers[0].up)


def replaced(model: Any) -> None:
    model.layers[0].forward = lambda x: x * 1.5


def scaled(model: Any) -> None:
    model.config.scale = 0.25


def tied(model: Any) -> None:
    model.head.weight = model.embed.weight


def fewer(model: Any) -> None:
    del model.layers[0]


def parametrized(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].up)


def doubled(model: Any) -> None:
    model.double()


def other_norm(model: Any) -> None:
    model.layers[0].norm.eps = 0.1


CHANGES = (hooked, hooked_before, adapted, replaced, scaled, tied, fewer, parametrized, doubled, other_norm)


@pytest.mark.family
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_state_is_another_program(saved: Home, change: Callable[[Any], None]) -> None:
    model = saved.model()
    change(model)
    assert not saved.right(model).from_cache


@pytest.mark.parametrize("change", [adapted, scaled], ids=lambda change: change.__name__)
def test_a_found_program_is_followed_through_changes(saved: Home, change: Callable[[Any], None]) -> None:
    model = saved.model()
    assert saved.right(model).from_cache
    change(model)
    assert not saved.right(model).from_cache


def test_weights_of_a_found_program_are_followed(saved: Home) -> None:
    model = saved.model()
    assert saved.right(model).from_cache
    with torch.no_grad():
        model.head.weight.mul_(-1)
        model.layers[0].up.weight.data.add_(0.1)
    assert saved.right(model).from_cache


def test_a_function_that_was_replaced_is_another_program(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: plain(x) * 2)
    with pytest.raises(Unsupported, match="other logits"):  # as it is converted: a trace takes torch's own function
        saved.right(saved.model())


def test_a_method_of_torch_that_was_replaced_is_another_program(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) * 2)
    assert not saved.right(saved.model()).from_cache


def test_a_hook_on_every_module_is_another_program(saved: Home) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.LayerNorm) else None
    )
    try:
        assert not saved.right(saved.model()).from_cache
    finally:
        handle.remove()


def test_options_are_part_of_it(saved: Home) -> None:
    assert not saved.right(saved.model(), max_context=96).from_cache
    assert not saved.right(saved.model(), kernels="aten").from_cache


def test_versions_are_part_of_it(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda *names: {"torch": "0"})
    assert not saved.right(saved.model()).from_cache


def test_treespecs_own_source_is_part_of_it(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_own_source", lambda: "another")
    assert not saved.right(saved.model()).from_cache


def test_kernels_are_part_of_it(saved: Home) -> None:
    registry.register_kernel(ops.tree_attention, ops.tree_attention, name="mine", priority=1)
    try:
        assert not saved.right(saved.model()).from_cache
    finally:
        registry.unregister_kernel(ops.tree_attention, "mine")


def test_an_example_is_part_of_it(saved: Home) -> None:
    ids = torch.arange(5)[None]
    options = {"lowering": "eager", "program_cache": str(saved.programs)}
    assert not treespec.tree_program(saved.model(), example=ids, options=options).from_cache


@pytest.mark.parametrize(
    "options",
    [{"verify": "off"}, {"pipeline": "default"}, {"verify_each": "semantic"}, {"program_cache": False}],
    ids=str,
)
def test_what_asks_for_a_conversion_gets_one(saved: Home, options: dict[str, Any]) -> None:
    assert not saved.right(saved.model(), **options).from_cache
    assert len(saved.files) == 1


# --- files and folders that are not what they should be


def test_a_program_that_is_wrong_is_given_up(saved: Home, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, lambda text: text.replace('"aten.silu.default"', '"aten.relu.default"'))
    with caplog.at_level(logging.WARNING, LOGGER):
        found = saved.right(saved.model())
    assert not found.from_cache
    assert str(saved.files[0]) in caplog.text and "given up" in caplog.text
    assert saved.right(saved.model()).from_cache  # it was saved anew


def rewrite(home: Home, change: Callable[[str], str], **others: str) -> None:
    """Write the program's file again, with another program and a right checksum."""
    (path,) = home.files
    with safe_open(str(path), "pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts = {part: about[part] for part in ("about", "trace", "program")}
    before = texts["program"]
    texts["program"] = change(before)
    assert texts["program"] != before or others
    save_file(tensors, path, {"schema": store.SCHEMA, **texts, "checksum": store._checksum(texts, tensors), **others})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def foreign(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path)


def pickled(path: Path) -> None:
    torch.save({"x": 1}, path)


def link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncated, cut_in_header, empty, other_byte, huge_header, foreign, pickled, link, folder)


@pytest.mark.family
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_and_not_used(
    saved: Home, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = saved.files[0]
    damage(path)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert f"{path} is not used" in caplog.text


@pytest.mark.family
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"aten.silu.default"', '"os.system"'),
        ('"aten.silu.default"', '"builtins.eval"'),
        ('"name":"silu"', '"name":"silu\\nimport os"'),
        ('"graph":', '"other":'),
        ('"sites":[', '"sites":[1,'),
        ('["source","embed.weight"', '["exec","embed.weight"'),
    ],
)
def test_a_malicious_program_is_named_and_not_used(
    saved: Home, before: str, after: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(saved, lambda text: text.replace(before, after.replace("\n", "\\n")))
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert f"{saved.files[0]} is not used" in caplog.text


def test_another_schema_is_not_read(saved: Home, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, lambda text: text, schema="treespec program 0")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert "treespec program 0" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_what_another_user_wrote_is_not_read(
    saved: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uid = os.getuid()
    monkeypatch.setattr(store.os, "getuid", lambda: uid + 1)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not saved.right(saved.model()).from_cache
    assert "another user" in caplog.text


def test_a_file_larger_than_any_program_is_not_read(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST", 1000)
    assert not saved.right(saved.model()).from_cache


def test_a_program_of_another_models_tensors_is_not_used(saved: Home) -> None:
    rewrite(saved, lambda text: text.replace('"head.weight"', '"../head.weight"'))
    assert not saved.right(saved.model()).from_cache


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_named(home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(store, "save_file", full)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not home.right(home.model()).from_cache
    assert str(home.programs) in caplog.text and "No space left" in caplog.text
    assert not list(home.programs.iterdir())


def test_a_folder_that_cannot_be_written_is_named(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.programs.write_text("a file, in the folder's place")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not home.right(home.model()).from_cache
    assert str(home.programs) in caplog.text


def test_a_read_only_folder_is_read(saved: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.os, "utime", refuse)
    assert saved.right(saved.model()).from_cache


def test_a_killed_writer_leaves_nothing_that_is_read(saved: Home) -> None:
    half = saved.programs / "half.program.tmp"
    half.write_bytes(saved.files[0].read_bytes()[:50])
    assert saved.right(saved.model()).from_cache
    long_ago = time.time() - 7200
    os.utime(half, (long_ago, long_ago))
    saved.right(saved.model(TEXTS["a method"]))  # saves one more
    assert not half.exists()


def test_the_least_recently_used_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = store.Store(tmp_path)
    monkeypatch.setattr(store, "MOST_FILES", 2)
    for number, name in enumerate(("a", "b", "c")):
        if name == "c":
            where.touch(next(entry for entry in where.entries() if entry.name == "a"))
        assert where.write(name, {"about": {}, "trace": {}, "program": {}}, {})
        os.utime(tmp_path / f"{name}.program", (number + 1.0, number + 1.0)) if name != "c" else None
    assert {entry.name for entry in where.entries()} == {"a", "c"}
    monkeypatch.setattr(store, "MOST_BYTES", 1)
    assert where.write("d", {"about": {}, "trace": {}, "program": {}}, {})
    assert [entry.name for entry in where.entries()] == ["d"]


# --- what no other process can know of is not saved


class Unregistered(nn.Module):
    """Its table lies in a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.tables = inner, [torch.ones(VOCAB)]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) * self.tables[0]


def test_a_tensor_that_no_module_keeps(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        home.right(Unregistered(home.model()).eval())
    assert "is not saved" in caplog.text and not home.files


def test_code_that_reads_the_environment(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    asks = 'self.factor * (2 if os.environ.get("TWICE") else 1)'
    with caplog.at_level(logging.INFO, LOGGER):
        home.right(home.model(("TEMPERATURE * self.factor", f"TEMPERATURE * {asks}")))
    assert "environment" in caplog.text and not home.files


def test_an_object_that_cannot_be_looked_into() -> None:
    for value in (memoryview(b"12"), {"a": iter([1])}, [{object()}]):
        with pytest.raises(Undigested, match="model"):
            PythonState({"model": value}, [], [])


# --- processes


def start(home: Home) -> subprocess.Popen[str]:
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[3:]; from saved_model import module_of; from pathlib import Path\n"
        "import treespec_compiler as treespec; torch.manual_seed(0)\n"
        "model = module_of(Path(sys.argv[2])).Decoder().eval()\n"
        "options = {'lowering': 'eager', 'program_cache': sys.argv[1]}\n"
        "out = treespec.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, options=options)\n"
        "print(out.stats.program_from_cache, out.sequences.tolist())\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(home.programs), str(home.text), str(here), str(here.parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here.parents[1])


def test_two_processes_at_once_and_a_third(home: Home) -> None:
    together = [start(home) for _ in range(2)]
    said = [each.communicate(timeout=300)[0].split(" ", 1) for each in together]
    found, third = start(home).communicate(timeout=300)[0].split(" ", 1)
    assert {tokens for _, tokens in said} == {third}
    assert found == "True" and len(home.files) == 1
    plain = treespec.generate(home.model(), torch.tensor([[1, 2, 3]]), max_new_tokens=8, options={"lowering": "eager"})
    assert third.strip() == str(plain.sequences.tolist())


# --- the option


@pytest.mark.parametrize("value", ["", 1.5, ["/a"]])
def test_a_wrong_option(value: Any) -> None:
    with pytest.raises(InvalidOption, match="program_cache"):
        Options(program_cache=value)


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("0", False), ("1", True), ("", True), ("/some/folder", "/some/folder")):
        monkeypatch.setenv("TREESPEC_PROGRAM_CACHE", text)
        assert Options.parse(None).saved_where == expected
        assert Options.parse({"program_cache": "/mine"}).saved_where == "/mine"
        assert Options.parse({"program_cache": False}).saved_where is False


def test_programs_are_saved_by_default(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TREESPEC_PROGRAM_CACHE", raising=False)
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    models = [home.model(), home.model(seed=1)]
    found = [treespec.tree_program(model, options={"lowering": "eager"}) for model in models[:1]]
    found[0].check()
    found.append(treespec.tree_program(models[1], options={"lowering": "eager"}))
    assert [each.from_cache for each in found] == [False, True]
    assert len([*(tmp_path / "cache" / "programs").glob("*.program")]) == 1


def test_a_home_that_cannot_be_written_to_is_named_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (home.programs.parent / "file").write_text("no folder")
    monkeypatch.delenv("TREESPEC_PROGRAM_CACHE", raising=False)
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(home.programs.parent / "file"))
    with caplog.at_level(logging.WARNING, LOGGER):
        for seed in (0, 1):
            program = treespec.tree_program(home.model(seed=seed), options={"lowering": "eager"})
            program.check()
            assert not program.from_cache
    assert len([r for r in caplog.records if "no program is saved" in r.getMessage()]) == 1


def test_large_constants_are_not_saved(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(programs, "LARGEST", -2)
    with caplog.at_level(logging.INFO, LOGGER):
        assert not home.right(home.model()).from_cache
    assert "bytes of folded constants" in caplog.text and not home.files


@pytest.fixture(autouse=True)
def _no_program_of_an_earlier_test() -> Iterator[None]:
    yield
    sys.modules.pop("saved_model_text", None)
