"""Options are parsed once, strictly, and can be keys of a cache."""

from __future__ import annotations

from typing import Any

import pytest

from treespec_compiler.errors import InvalidOption, UnknownOption
from treespec_compiler.options import Options


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREESPEC_LOWERING", raising=False)


def test_parse_accepts_nothing_a_mapping_and_options() -> None:
    assert Options.parse() == Options.parse({}) == Options()
    parsed = Options.parse({"lowering": "eager", "prefill_chunk": 8})
    assert parsed == Options(lowering="eager", prefill_chunk=8)
    assert Options.parse(parsed) is parsed
    assert len({parsed, Options.parse({"lowering": "eager", "prefill_chunk": 8})}) == 1


def test_environment_overrides_the_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREESPEC_LOWERING", "eager")
    assert Options.parse().lowering == "eager"
    assert Options.parse(Options(lowering="inductor", kernels="aten")) == Options(lowering="eager", kernels="aten")
    monkeypatch.setenv("TREESPEC_LOWERING", "fast")
    with pytest.raises(InvalidOption, match="Set or unset the environment variable TREESPEC_LOWERING"):
        Options.parse()


def test_unknown_name() -> None:
    with pytest.raises(UnknownOption, match=r"got 'verify_eech'.*Did you mean 'verify_each'\?"):
        Options.parse({"verify_eech": "spec"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lowering": "jit"}, "Invalid option lowering: got 'jit', expected 'inductor' or 'eager'"),
        ({"on_unsupported": None}, "got None, expected 'raise' or 'fallback'"),
        ({"verify_each": True}, "got True, expected 'none' or 'spec' or 'semantic'"),
        ({"kernels": ["aten"]}, r"got \['aten'\], expected 'auto' or 'aten' or 'reference'"),
        ({"weights": "int3"}, "got 'int3', expected 'exact' or 'float32'"),
        ({"max_context": 0}, "Invalid option max_context: got 0, expected a positive integer or None"),
        ({"max_context": "4k"}, "got '4k', expected a positive integer or None"),
        ({"prefill_chunk": True}, "got True, expected 1 to 32768 or None"),
        ({"prefill_chunk": 32769}, "got 32769, expected 1 to 32768 or None"),
        ({"cuda_graphs": "yes"}, "Invalid option cuda_graphs: got 'yes', expected 'auto' or True or False"),
        ({"cuda_graphs": 1}, "got 1, expected 'auto' or True or False"),
        ([("lowering", "eager")], "Invalid option options: got .*expected a mapping, an Options or None"),
    ],
)
def test_wrong_values(options: Any, text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        Options.parse(options)
