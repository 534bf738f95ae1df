"""A sample of the zoo of `treespec coverage`, and the page it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import modules
from modules import NanoGPT

from treespec_compiler.cli.coverage import foreign
from treespec_compiler.cli.coverage.check import Result, check_type
from treespec_compiler.cli.coverage.models import (
    CLASS_OF,
    CLASSES,
    VOCAB,
    has_window,
    model_types,
    tiny_config,
    tiny_model,
)
from treespec_compiler.cli.coverage.report import foreign_section, page, section_of, with_section
from treespec_compiler.cli.main import main

EXACT = ("qwen3", "codegen", "mistral", "qwen2_moe", "deepseek_v3", "doge", "jetmoe", "lfm2", "qwen3_next", "mamba2")
REFUSED = {"bert": "bidirectional"}
MIXERS = {
    "zaya": "ZayaCCAProjection",
    "deepseek_v4": "DeepseekV4Attention",
    "minimax_m3_vl_text": "MiniMaxM3VLIndexer",
}


def test_the_survey_names_each_type_once() -> None:
    names = [name for names in CLASSES.values() for name in names.split()]
    assert len(names) == len(set(names)) == len(CLASS_OF)
    assert set(names) <= set(model_types())


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "deepseek_v2", "llama4_text", "gpt_neo"])
def test_configurations_are_shrunk(name: str) -> None:
    config = tiny_config(name, window=4).get_text_config()
    assert config.hidden_size == 64
    assert config.num_hidden_layers <= 4
    assert has_window(config) == (name not in ("mixtral", "deepseek_v2"))


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_sample_is_exact(name: str) -> None:
    result = check_type(name)
    assert result.verdict == "exact", result
    assert result.error is not None and result.error <= 1e-4
    assert result.packing is not None and result.packing <= 1e-5  # a forest is what each slot alone is
    assert result.variants == (["window 4", "window 24"] if name == "mistral" else ["default"])


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phimoe"])
@pytest.mark.rare
def test_batched_experts_are_exact(name: str) -> None:
    assert tiny_model(name, experts="batched_mm").config._experts_implementation == "batched_mm"
    result = check_type(name, experts="batched_mm")
    assert result.verdict == "exact", result


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_sample_is_refused_by_name(name: str) -> None:
    result = check_type(name)
    assert result.verdict == "refused", result
    assert REFUSED[name] in f"{result.reason} {result.layer} {result.source}".lower()
    assert result.source and result.layer


@pytest.mark.family
@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.rare
def test_another_token_mixer_is_refused_by_its_class(name: str) -> None:
    result = check_type(name)
    assert result.verdict == "refused", result
    assert result.module == MIXERS[name] and result.layer and result.source


def test_the_page_counts_by_class_and_says_why_not() -> None:
    results = [
        Result("llama", "A", "exact", 5e-7, 0.0, 2, ["k <= q"]),
        Result(
            "mamba",
            "E",
            "refused",
            reason="a | b",
            source="/x/y.py:12, in forward: f(x)",
            layer="layers.0.mixer",
            module="Mixer",
        ),
        Result("mistral", "D", "wrong", 0.5, reason="far away", variant="window 24"),
    ]
    text = page(results, ["opt", "bloom"])
    assert "Not run (2): opt, bloom." in text
    assert "| all | 3 | 1 | 1 | 1 | 0 |" in text
    assert "| llama | exact | 5.0e-07 | 0.0e+00 | 2 | `k <= q` |  |" in text
    assert "a \\| b at `y.py:12` in `layers.0.mixer` (Mixer)" in text
    assert "far away (window 24)" in text


@pytest.mark.slow
@pytest.mark.rare
def test_the_command_resumes_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, output, data = tmp_path / "lines.jsonl", tmp_path / "docs" / "coverage.md", tmp_path / "coverage.json"
    lines.write_text(json.dumps(Result("gpt2", "A", "exact", 1e-7, 1e-8, 2, ["k <= q"]).__dict__) + "\n")
    arguments = ["--only", "gpt2,bert", "--resume", "--lines", lines, "--output", output, "--json", data]
    assert main(["coverage", *map(str, arguments)]) == 0
    assert [r["verdict"] for r in json.loads(data.read_text())] == ["exact", "refused"]
    assert "| gpt2 | exact | 1.0e-07 |" in output.read_text()
    assert len(lines.read_text().splitlines()) == 2
    assert "exact: 1" in capsys.readouterr().out


def test_an_unknown_type_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--only", "llama,lama"]) == 2
    assert "'lama'" in capsys.readouterr().err


def test_packages_that_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"here": ("modules", {"nanoGPT": NanoGPT}), "gone": ("no_such_package", {"any": NanoGPT})}
    monkeypatch.setattr(foreign, "PACKAGES", packages)
    monkeypatch.setattr(modules, "VOCAB", VOCAB)
    monkeypatch.setattr(modules, "CONTEXT", 128)
    assert foreign.installed() == (["here: nanoGPT"], ["gone"])
    result = check_type("gone: any")
    assert result.verdict == "exact", result


def test_a_package_whose_decoder_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> NanoGPT:
        raise ImportError("needs another package")

    monkeypatch.setattr(foreign, "PACKAGES", {"here": ("modules", {"broken": broken})})
    result = check_type("here: broken")
    assert result.verdict == "error" and result.reason == "ImportError: needs another package"


def test_the_section_on_other_packages_is_kept_and_replaced() -> None:
    found = [Result("x-transformers: rotary", "N", "exact", 5e-7, 0.0, 2, ["k <= q"])]
    section = foreign_section(found, ["litgpt"])
    assert "left out: litgpt." in section and "| x-transformers: rotary | exact |" in section
    whole = with_section("# Page\n", section)
    assert whole.startswith("# Page\n\n## Other packages") and section_of(whole) == whole[len("# Page\n\n") :]
    assert with_section(whole, foreign_section([], [])).count("## Other packages") == 1
