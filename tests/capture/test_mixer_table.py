"""Functions that are known as recurrences: believed for one source and after a test, refused otherwise."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import operator
import re
import sys
from pathlib import Path
from typing import Any

import mixer_functions
import pytest
import torch
import zoo
from mixer_functions import BothSides, ByLength, Mixed, Restarted
from modules import HEADS, VOCAB
from oracles import EAGER, assert_decodes
from torch import Generator, nn

import treespec_compiler as treespec
from treespec_compiler.capture import mixers
from treespec_compiler.errors import InvalidMixer, Refusal, Unsupported

D = 4
PAGE = Path(__file__).parents[2] / "docs" / "hybrids.md"


@pytest.fixture(autouse=True)
def forget_registered(monkeypatch):
    monkeypatch.setattr(mixers, "_MIXERS", {name: [*known] for name, known in mixers._MIXERS.items()})


def samples(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    q, k, v = torch.randn(3, 1, tokens, HEADS, D, generator=generator, dtype=torch.float64)
    return [((q, k, v, -torch.rand(1, tokens, HEADS, generator=generator, dtype=torch.float64)), {})]


def restarts(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    (args, _) = samples(tokens, generator)[0]
    return [((*args, torch.rand(1, tokens, generator=generator) < 0.2), {})]


def register(name: str, spelled: str = "fading_sums_as_recurrence", given_=samples) -> None:
    treespec.register_mixer(getattr(mixer_functions, name), getattr(mixer_functions, spelled), given_)


def program_of(model: nn.Module) -> Any:
    return treespec.tree_program(model, options=EAGER)


def test_without_an_entry_it_is_refused() -> None:
    with pytest.raises(Unsupported):
        program_of(Mixed())


def test_a_user_s_recurrence_is_exact() -> None:
    register("fading_sums")
    torch.manual_seed(3)
    model = Mixed()
    program = program_of(model)
    assert [(s.kind, s.shape) for s in program.states] == [("recurrence", (HEADS, D, D))] * 2
    assert "mixer_functions.py" in program.states[0].source
    for prompt in (1, 6):
        assert_decodes(model, program, VOCAB, rounds=2, prompt=prompt)


DECODER = """

class Decoder(mixer_functions.Mixed):
    def mixed(self, q, k, v, decay, ids):
        return sums_of_the_page(q, k, v, decay)
"""


def test_the_page_s_example_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n([^`]*register_mixer[^`]*)```", PAGE.read_text("utf-8"))
    block = block.replace("fading_sums", "sums_of_the_page")  # `Mixed`, which it inherits from, has its own
    imports = "import mixer_functions\nimport torch\n\nimport treespec_compiler as treespec\n\n\n"
    (tmp_path / "decoder_of_the_page.py").write_text(imports + block + DECODER)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(6)
    model = importlib.import_module("decoder_of_the_page").Decoder()
    program = program_of(model)
    assert "decoder_of_the_page.py" in program.states[0].source
    assert_decodes(model, program, VOCAB, rounds=1, prompt=6)


def test_a_method_is_exact() -> None:
    def of_nobody(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [((None, *args), kwargs) for args, kwargs in samples(tokens, generator)]

    treespec.register_mixer(mixer_functions.ByMethod.sums, mixer_functions.sums_as_recurrence, of_nobody)
    torch.manual_seed(5)
    model = mixer_functions.ByMethod()
    assert_decodes(model, program_of(model), VOCAB, rounds=2, prompt=6)


def test_a_state_that_a_token_resets_is_exact() -> None:
    register("restarted_sums", "restarted_sums_as_recurrence", restarts)
    torch.manual_seed(4)
    model = Restarted()
    assert_decodes(model, program_of(model), VOCAB, rounds=2, size=20, prompt=9)


@pytest.mark.parametrize(("kind", "name"), [(ByLength, "sums_by_length"), (BothSides, "sums_of_both_sides")])
def test_one_that_gives_other_values_is_refused(kind: type[nn.Module], name: str) -> None:
    """A decay that depends on the length, and a look ahead."""
    register(name)
    with pytest.raises(Unsupported, match=f"{name} gives other values for 1?[0-9]* ?tokens") as caught:
        program_of(kind())
    assert caught.value.kind is Refusal.MIXER and "mixer_functions.py" in str(caught.value.source)


def test_one_whose_source_is_another_is_refused(tmp_path, monkeypatch) -> None:
    """transformers' own, with one number changed."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next as own

    text = inspect.getsource(own)
    assert "eps: float = 1e-6):" in text
    file = tmp_path / "changed_modeling.py"
    file.write_text(
        text.replace("from ... import", "from transformers import")
        .replace("from ...", "from transformers.")
        .replace("from .configuration", "from transformers.models.qwen3_next.configuration")
        .replace("eps: float = 1e-6):", "eps: float = 1e-5):")
    )
    spec = importlib.util.spec_from_file_location("changed_modeling", file)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_modeling", changed)
    spec.loader.exec_module(changed)
    model = zoo.tiny_model("qwen3_next")
    with pytest.raises(Unsupported, match=r"known as a recurrence, but not with this source \(hash [0-9a-f]{16}\)"):
        program_of(changed.Qwen3NextForCausalLM(model.config).eval())


def test_every_known_source_is_an_installed_one_s() -> None:
    pytest.importorskip("transformers")
    for where, name in {
        "qwen3_next": "torch_chunk_gated_delta_rule",
        "olmo_hybrid": "torch_chunk_gated_delta_rule",
        "mamba2": "mamba2_chunk_scan",
        "bamba": "mamba2_chunk_scan",
        "mamba": "mamba_selective_scan",
        "kimi_linear": "chunk_kimi_delta_attention",
        "recurrent_gemma": "RecurrentGemmaRglru._rnn_scan",
        "minimax": "MiniMaxLightningAttention.forward",
        "rwkv": "rwkv_linear_attention",
        "xlstm": "xLSTMBackend.forward",
    }.items():
        module = importlib.import_module(f"transformers.models.{where}.modeling_{where}")
        function = inspect.unwrap(operator.attrgetter(name)(module))
        mixer = mixers._MIXERS[name][0]
        assert mixers.source_hash(function) in mixer.hashes
        mixers._test(function, mixer)


def test_a_layer_whose_buffers_are_others_is_refused() -> None:
    """Lightning attention reads decays of its blocks from buffers; the recurrence knows the rates alone."""
    pytest.importorskip("transformers")
    model = zoo.tiny_model("minimax")
    layer = model.model.layers[1].self_attn
    layer.key_decay[0, 3] *= 1.5
    with pytest.raises(
        Unsupported, match=r"model.layers.1.self_attn has buffers that are not what .*LightningAttention"
    ):
        mixers.mixers_of(model)


@pytest.mark.family
def test_a_backend_that_calls_other_kernels_is_refused() -> None:
    """An mLSTM's own source does not name what it calls: partial functions that `__init__` made."""
    pytest.importorskip("transformers")
    from transformers.models.xlstm import modeling_xlstm as own

    model = zoo.tiny_model("xlstm")
    backend = model.backbone.blocks[1].mlstm_layer.mlstm_backend
    assert len(mixers.mixers_of(model)) == 1
    known = backend._inference_fn

    def other(*args: Any, **kwargs: Any) -> Any:
        return own.mlstm_recurrent_sequence_native(*args, **kwargs)

    for changes in ({"mlstm_sequence_kernel": other}, {"eps": 1e-3}, {"mlstm_step_kernel": None}):
        backend._inference_fn = functools.partial(known.func, **(known.keywords | changes))
        with pytest.raises(Unsupported, match=r"blocks.1.mlstm_layer.mlstm_backend calls kernels of the mLSTM"):
            mixers.mixers_of(model)


def nonlinear(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """An sLSTM's heart: the state goes through a function of itself. [1, T, D] of x and of gates."""
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.sigmoid(gate[:, t]) * state + torch.tanh(x[:, t] + 0.5 * state)
        out.append(state)
    return torch.stack(out, 1)


def nonlinear_as_recurrence(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    import torch

    ones = torch.ones_like(x)[..., None]
    decay = torch.nn.functional.logsigmoid(gate)
    return torch.ops.treespec.recurrence(ones, ones, torch.tanh(x)[..., None], decay, None)[..., 0]


class Nonlinear(Mixed):
    def mixed(self, q: Any, k: Any, v: Any, decay: Any, ids: Any) -> Any:
        return nonlinear(q.flatten(2), k.flatten(2)).unflatten(2, q.shape[2:])


def test_a_nonlinear_recurrence_is_no_sum_whatever_is_said_of_it() -> None:
    def of_it(tokens: int, generator: Generator) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [((*torch.randn(2, 1, tokens, 5, generator=generator),), {})]

    treespec.register_mixer(nonlinear, nonlinear_as_recurrence, of_it)
    with pytest.raises(Unsupported, match=r"nonlinear gives other values for [0-9]+ tokens") as caught:
        program_of(Nonlinear())
    assert caught.value.kind is Refusal.MIXER


def test_code_that_changes_after_a_conversion_is_noticed(monkeypatch) -> None:
    register("fading_sums")
    model = Mixed()
    program = program_of(model)
    assert program_of(model) is program
    monkeypatch.setattr(mixer_functions.fading_sums, "__code__", mixer_functions.sums_of_both_sides.__code__)
    with pytest.raises(Unsupported, match="not with this source"):
        program_of(model)


def test_functions_that_cannot_change_places() -> None:
    with pytest.raises(InvalidMixer, match="got the parameters q, k, v, decay, restart"):
        register("fading_sums", "restarted_sums_as_recurrence")
    with pytest.raises(InvalidMixer, match="without code"):
        treespec.register_mixer(torch.add, mixer_functions.fading_sums_as_recurrence, samples)
    outer = 2.0

    def inner(q, k, v, decay):
        return q * outer

    with pytest.raises(InvalidMixer, match="around it"):
        treespec.register_mixer(mixer_functions.fading_sums, inner, samples)
