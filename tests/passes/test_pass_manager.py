"""Pipelines, users' passes, what the verifier says about broken ones, instruments, reproducers."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import EAGER, decoder, summing
from torch import fx

import treespec_compiler as treespec
from treespec_compiler import passes
from treespec_compiler.capture.call import call_spec
from treespec_compiler.cli.main import main
from treespec_compiler.errors import InvalidPipeline, PassError, Unsupported
from treespec_compiler.inspection.failures import bisect, read, run_again, same_failure
from treespec_compiler.ir import ops
from treespec_compiler.ir.registry import best_kernel
from treespec_compiler.options import Options
from treespec_compiler.passes.framework.found import built_in, in_order
from treespec_compiler.passes.framework.instruments import Dumper, GraphPrinter
from treespec_compiler.passes.framework.manager import Pass, run_passes
from treespec_compiler.passes.framework.plan import plan
from treespec_compiler.passes.framework.registry import register_pass, registered_passes, unregister_pass
from treespec_compiler.passes.framework.state import GraphState
from treespec_compiler.pipeline import convert, prepare

NAMES = [p.slug for p in built_in() if p.standard]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TREESPEC_CACHE_DIR", str(tmp_path / "cache"))
    before = set(registered_passes())
    yield
    for name in set(registered_passes()) - before:
        unregister_pass(name)


def own(name: str, after: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Pass:
    return Pass(name, lambda state: 0, "", "", place_after=after, place_before=before, user=True)


def slugs(text: str | None, **others: Pass) -> list[str]:
    return [p.slug for p in plan(text, built_in(), others)]


def test_every_file_of_the_folder_is_the_pass_it_is_named_by() -> None:
    folder = Path(passes.__path__[0])
    files = {p.stem.replace("_", "-") for p in folder.glob("*.py")} - {"--init--"}
    assert files == {p.slug for p in built_in()}
    for step in built_in():
        assert Path(sys.modules[inspect.unwrap(step.run).__module__].__file__ or "").stem == step.slug.replace("-", "_")


def test_the_order_of_the_passes() -> None:
    assert [p.slug for p in built_in()] == [
        "normalize",
        "rows-apart",
        "every-position",
        "choose-regime",
        "strip-native-cache",
        "recognize-states",
        "recognize-attention",
        "classify",
        "token-locality",
        "discharge-guards",
        "treeify",
        "insert-state",
        "select-rows",
        "quantize",
        "shard",
        "split",
        "fuse",
        "fuse-rope",
        "join-linears",
        "tap",
        "bind-kernels",
        "offload",
    ]
    # What `default` stands for is placed in the same order.
    assert plan(None, built_in(), wanted=lambda step: True) == list(built_in())
    assert not {"quantize", "shard", "split", "fuse-rope", "join-linears", "tap", "offload"} & set(NAMES)


def test_a_pass_is_put_in_order_by_what_it_needs() -> None:
    steps = [own("c", after=("b",)), own("b", before=("a",)), own("a")]
    assert [p.name for p in in_order([*steps, replace(own("d"), needs=("c",))])] == ["b", "c", "a", "d"]
    with pytest.raises(InvalidPipeline, match="passes that wait for each other: "):
        in_order([own("a", after=("b",)), own("b", after=("a",))])
    with pytest.raises(InvalidPipeline, match="no pass 'gone', which 'a' names"):
        in_order([own("a", after=("gone",))])


def test_a_pass_that_is_not_wanted_can_still_be_named() -> None:
    without = [p.slug for p in plan("default", built_in(), wanted=lambda step: step.slug != "fuse")]
    assert without == [p.slug for p in built_in() if p.slug != "fuse"]
    named = plan("default,fuse", built_in(), wanted=lambda step: step.standard and step.slug != "fuse")
    assert [p.slug for p in named] == NAMES
    assert slugs("default,quantize,shard,split,fuse-rope,join-linears,tap,offload") == [p.slug for p in built_in()]


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, {"quantize", "shard", "split", "fuse-rope", "join-linears", "tap", "offload"}),
        ({"kernels": "aten"}, {"quantize", "shard", "split", "fuse", "fuse-rope", "join-linears", "tap", "offload"}),
        (
            {"kernels": "reference"},
            {"quantize", "shard", "split", "fuse", "fuse-rope", "join-linears", "tap", "offload", "bind-kernels"},
        ),
    ],
)
def test_what_is_wanted_depends_on_the_options(options: dict[str, str], absent: set[str]) -> None:
    prepared = prepare(decoder(), call_spec(decoder()), Options.parse({"lowering": "eager"} | options))
    if best_kernel(ops.packed_linear, torch.device("cpu"), torch.float32) is None:
        absent = absent | {"fuse"}
    assert {p.slug for p in built_in()} - {p.slug for p in prepared.passes} == absent


def test_pipeline_strings() -> None:
    assert slugs(None) == slugs("default") == NAMES
    assert slugs("-fuse") == slugs("default,-fuse") == [n for n in NAMES if n != "fuse"]
    assert slugs("normalize, recognize attention") == ["normalize", "recognize-attention"]
    assert slugs("normalize,mine,recognize_attention", mine=own("mine")) == ["normalize", "mine", "recognize-attention"]
    assert slugs("default,mine", mine=own("mine")) == [*NAMES, "mine"]


def test_after_and_before_place_a_pass() -> None:
    assert slugs("default,mine", mine=own("mine", after=("classify",)))[NAMES.index("classify") + 1] == "mine"
    assert slugs("mine,default", mine=own("mine", before=("normalize",)))[0] == "mine"
    both = {"a": own("a", after=("treeify",)), "b": own("b", after=("a",), before=("insert state",))}
    found = slugs("default,b,a", **both)
    assert found[found.index("treeify") :][:4] == ["treeify", "a", "b", "insert-state"]
    # A pass this device has no kernels for is not run; the place is the one it would have had.
    found = [p.slug for p in plan("-fuse,mine", built_in(), {"mine": own("mine", after=("fuse",))})]
    assert found[-2:] == ["mine", "bind-kernels"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default,fuze", "got no pass 'fuze', expected one of normalize"),
        ("default,fuse", "got pass 'fuse' twice"),
        ("classify", "got pass 'classify' on a graph at level 'captured', expected a graph at level 'recognized'"),
        ("-treeify", "Run 'treeify' before it."),
        ("default,mine", "got pass 'mine' after treeify and before classify, expected a place that satisfies both"),
    ],
)
def test_wrong_pipelines(text: str, message: str) -> None:
    with pytest.raises(InvalidPipeline) as error:
        slugs(text, mine=own("mine", after=("treeify",), before=("classify",)))
    assert message in str(error.value)


def test_a_program_needs_every_proof() -> None:
    with pytest.raises(InvalidPipeline, match="without 'token locality'"):
        treespec.tree_program(decoder(), options=EAGER | {"pipeline": "-token-locality"})


def test_no_pass_waits_for_the_code_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one's clean-up asks for it, which takes 0.1 s for 32 layers; it is made when somebody runs the graph."""
    prepared = prepare(decoder(), call_spec(decoder()), Options.parse(EAGER))
    made: list[fx.Graph] = []
    original = fx.Graph.python_code

    def python_code(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        made.append(graph)
        return original(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", python_code)
    run_passes(prepared.state, prepared.passes, prepared.checks)
    assert made == []
    assert "tree_attention" in prepared.state.gm.code  # as it is after the last pass
    assert made == [prepared.state.graph]


def breaking(name: str, how: str, **place: Any) -> None:
    @register_pass(name, changes=how != "claims to read", **place)
    def run(state: GraphState) -> Any:
        calls = [n for n in state.graph.nodes if n.op == "call_function"]
        if how in ("wrong meaning", "claims to read"):
            node = next(n for n in calls if n.target is torch.ops.aten.relu.default)
            node.target = torch.ops.aten.tanh.default
        elif how == "counts tokens":
            node = next(n for n in calls if n.target is torch.ops.aten.relu.default)
            steps = state.call(torch.ops.aten.arange.default, (3,), like=node)
            node.replace_all_uses_with(state.call(torch.ops.aten.mul.Tensor, (node, steps), like=node.next))
        elif how == "raises":
            raise KeyError("gone")
        elif how == "returns nothing":
            return None
        elif how == "no value":
            with state.graph.inserting_before(state.output):
                new = state.graph.call_function(torch.ops.aten.relu.default, (state.logits,))
            state.output.replace_input_with(state.logits, new)
        return 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wrong meaning", "away from the model's on the path"),
        ("claims to read", "got a changed graph, expected the same graph (changes=False)"),
        ("raises", "got KeyError: 'gone', expected a pass that runs through"),
        ("returns nothing", "got NoneType returned, expected the number of matches"),
        ("no value", "got a node without a fake value:"),
    ],
)
def test_broken_user_passes_are_caught(how: str, message: str) -> None:
    breaking("mine", how, after="treeify")
    with pytest.raises(PassError) as error:
        treespec.tree_program(decoder(), options=EAGER | {"pipeline": "default,mine"})
    assert str(error.value).startswith("Pass 'mine' left a wrong graph: ")
    assert message in str(error.value)
    assert str(error.value).endswith("Nothing was converted: mend the pass, or take it out of the pipeline (-mine).")


def test_a_correct_user_pass_is_part_of_the_program() -> None:
    @register_pass("double negation", after="token locality", promises="every relu is negated twice")
    def run(state: GraphState) -> int:
        nodes = [n for n in state.graph.nodes if n.target is torch.ops.aten.relu.default]
        for node in nodes:
            users = list(node.users)
            once = state.call(torch.ops.aten.neg.default, (node,), like=node.next)
            twice = state.call(torch.ops.aten.neg.default, (once,), like=once.next)
            for user in users:
                user.replace_input_with(node, twice)
        return len(nodes)

    model = decoder()
    program = treespec.tree_program(model, options=EAGER | {"pipeline": "default,double-negation"})
    assert program.history["double negation"].matches == 2
    assert [n.target for n in program.graph_module.graph.nodes].count(torch.ops.aten.neg.default) == 4
    logits = program.prefill([1, 2, 3], program.new_cache(16))
    assert torch.allclose(logits, model(torch.tensor([[1, 2, 3]]))[0, -1], atol=1e-5)


def test_meaning_is_checked_after_every_pass() -> None:
    treespec.tree_program(decoder(), options=EAGER | {"verify_each": "semantic"})


def test_printer_and_dumps(tmp_path: Path) -> None:
    shown: list[str] = []
    printer = GraphPrinter(lambda title, graph: shown.append(title), frozenset({"treeify"}), on_change=True)
    model, dumper = decoder(), Dumper(folder=tmp_path)
    convert(model, call_spec(model), Options.parse(EAGER), instruments=[printer, dumper])
    assert "before treeify" in shown and "after treeify (changed)" in shown
    assert not any("token locality" in s or "discharge" in s for s in shown)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert "00-capture.json" in files and "11-treeify.py" in files and "11-treeify.dot" in files
    assert "def after_treeify(" in (tmp_path / "11-treeify.py").read_text()


def test_structured_trace_has_an_artifact_for_every_pass(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch.__trace")
    seen: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(getattr(record, "metadata", {}))

    handler = Keep()
    log.addHandler(handler)
    try:
        model = decoder()
        convert(model, call_spec(model), Options.parse(EAGER))
    finally:
        log.removeHandler(handler)
    names = [m["artifact"]["name"] for m in seen if "artifact" in m]
    assert [n for n in names if n.startswith("treespec_")][:3] == [
        "treespec_after_capture",
        "treespec_after_normalize",
        "treespec_after_rows_apart",
    ]


@pytest.mark.rare
def test_reproducer_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    breaking("mine", "wrong meaning", after="select rows")
    with pytest.raises(PassError) as error:
        treespec.tree_program(decoder(), options=EAGER | {"pipeline": "default,mine"})
    (folder,) = (tmp_path / "cache" / "reproducers").iterdir()
    assert f"treespec reproduce {folder}" in error.value.__notes__[0]
    info = json.loads((folder / "reproducer.json").read_text())
    assert info["failing_pass"] == "mine" and info["versions"]["torch"] == torch.__version__

    failure = read(folder)
    again = run_again(failure)
    assert same_failure(failure, again) and str(again) == str(error.value) == info["text"]
    culprit = bisect(failure)
    assert culprit is not None and culprit.name == "mine" and culprit.looked_at <= 5
    assert main(["reproduce", str(folder)]) == 1
    assert capsys.readouterr().out.startswith("the same failure in mine\n")
    assert main(["reproduce", str(folder), "--bisect", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["pass"] == "mine"

    unregister_pass("mine")
    with pytest.raises(InvalidPipeline, match="--run-saved-passes"):
        read(folder)
    register_pass("mine", after="select rows")(lambda state: 0)
    assert main(["reproduce", str(folder)]) == 0
    assert "passes now" in capsys.readouterr().out


def test_refusals_leave_no_reproducer(tmp_path: Path) -> None:
    with pytest.raises(Unsupported):
        treespec.tree_program(summing(), options=EAGER)
    assert not (tmp_path / "cache" / "reproducers").exists()
