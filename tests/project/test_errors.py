"""Every error of the catalogue prints a whole text, keeps its fields, and survives pickling."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import pytest

from treespec_compiler import errors
from treespec_compiler.errors import Refusal, TreespecError, UnknownOption, Unsupported

EXAMPLES: list[TreespecError] = [
    Unsupported(
        Refusal.BRANCH, "a window the trace was too short to show", node="%mask = le(a, b)", layer="model.layers.0"
    ),
    errors.InvalidTree(got="no nodes", expected="at least one"),
    errors.InvalidForest(got="slot 1 twice", expected="every slot at most once"),
    errors.InvalidFolder(folder="out", got="no manifest.json", expected="one"),
    errors.UnsavableProgram(got="a call of an op that somebody registered"),
    errors.InvalidPrompt(got="no ids", expected="at least one"),
    errors.TokenOutOfRange(token=70, index=3, vocab_size=64),
    errors.CacheOverflow(slot=0, length=60, new=8, capacity=64),
    errors.OutOfPages(wanted=3, free=1, total=8, page_size=64),
    errors.RequestTooLarge(prompt=900, new=200, capacity=1024),
    errors.EngineClosed(number=7),
    errors.InvalidMixer(name="scan", got="a lambda", expected="a function of a module"),
    errors.RanksDiffer(rank=1, names=["options", "input_ids"]),
    errors.RankFailed(rank=1, problem="OSError (no such file)"),
    errors.RankLost(rank=0, size=2, step=17),
    errors.WeightsUnreadable(path="layer-0002.bin", offset=8192, problem="the end of the file"),
    errors.NoRoomForWeights(folder="/tmp/blobs", needed=3_000_000_000, free=1_000_000),
    errors.ContextOverflow(position=64, max_context=64),
    errors.HiddenStart(token=0, where="the prompt"),
    errors.StaleCache(reason="the model moved to another device"),
    errors.InvalidWeight(got="head.weight as float32 [7, 4]", expected="a size that 2 units divide"),
    errors.InvalidPath(got="[0, 2]", expected="every parent to be its predecessor"),
    errors.UnknownSlot(slot=4, slots=2),
    errors.UnknownOption(name="lowring", known=["lowering", "kernels"]),
    errors.WrongType(name="attention_mask", got=1, expected="a tensor"),
    errors.InvalidOption(name="lowering", got="jit", expected="'inductor' or 'eager'"),
    errors.LossyPair(pair="sampler='top-k' with verifier='multi-step'", reason="Not drawn.", instead="'naive'"),
    errors.InvalidLogits(position=17),
    errors.DraftFailed(draft="lookup", method="propose"),
    errors.ModelFailed(tokens=33, problem="IndexError: index out of range in self"),
    errors.TokenizerMismatch(difference="id 7 as 'a' in the draft and 'b' in the target"),
    errors.UnreadableModel(name="hf:/nowhere", problem="no such folder"),
    errors.MissingPackage(package="triton", purpose="generated kernels", fix="Install it: pip install triton."),
    errors.MissingCompiler(looked_for="g++"),
    errors.CorruptTable(path="tree_attention/cpu.json", problem="no key 'schema'"),
    errors.CaptureFailed(problem="RuntimeError (operation not permitted when stream is capturing)"),
    errors.WrongKernel(
        kernel="tree attention of 8 heads over 2 of 96 numbers", error=0.16, tolerance=0.015, versions="triton 3.6.0"
    ),
    errors.PassError(pass_name="treeify", problem="an arange over the sequence is left"),
    errors.PassError(pass_name="probe", problem="a changed graph", user=True),
    errors.InvalidKernel(name="mine", got="the op attend", expected="an op of the tree IR: tree_attention"),
    errors.InvalidPipeline(got="no pass 'fuze'", expected="a known pass"),
]


def test_every_class_has_an_example() -> None:
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, TreespecError)}
    assert classes - {TreespecError} == {type(e) for e in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_text_fields_and_pickle(error: TreespecError) -> None:
    text = str(error)
    assert "{" not in text and text.strip() == text
    if not isinstance(error, Unsupported):
        assert "got " in text and "expected " in text and text.endswith((".", "?"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == text
    assert dataclasses.is_dataclass(error)


def test_cache_overflow_names_the_capacity_that_would_do() -> None:
    text = str(errors.CacheOverflow(slot=3, length=60, new=8, capacity=64))
    assert text == (
        "The cache is full: slot 3 holds 60 tokens and got 8 more, expected at most 64 in all (uncommitted tree nodes "
        "included). Make a larger cache, `new_cache(max_tokens=68)` or more, or free the slot."
    )


def test_unknown_option_names_the_nearest() -> None:
    assert str(UnknownOption(name="lowring", known=["lowering", "kernels"])) == (
        "Unknown option: got 'lowring', expected one of kernels, lowering. Did you mean 'lowering'?"
    )
    assert str(UnknownOption(name="zzz", known=["lowering"])).endswith("Remove it.")


def test_unsupported_prints_node_source_layer_reason_and_way_out() -> None:
    error = Unsupported(
        Refusal.MIXER,
        "roll moves values between tokens",
        node="%roll = aten.roll(%x, [1], [1])",
        source="model.py:12\n    x = x.roll(1, 1)",
        layer="blocks.0",
        way_out="use a causal convolution with a state",
    )
    assert str(error).splitlines() == [
        "treespec cannot convert this model.",
        "  node:    %roll = aten.roll(%x, [1], [1])",
        "  source:  model.py:12",
        "               x = x.roll(1, 1)",
        "  layer:   blocks.0",
        "  reason:  roll moves values between tokens",
        "  way out: use a causal convolution with a state",
    ]
    assert "on_unsupported" in str(Unsupported(Refusal.NO_ATTENTION, "no attention at all"))


def test_the_base_takes_a_plain_message() -> None:
    assert str(TreespecError("what")) == "what"
    assert str(pickle.loads(pickle.dumps(TreespecError("what")))) == "what"
