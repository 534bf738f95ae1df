"""`treespec bench serve`: a server under load, measured from outside."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("uvicorn")

from treespec_compiler.cli.main import main
from treespec_compiler.serving.clients import Answered, Endpoint, Measurement, ask, percentiles


def test_percentiles_are_values_that_were_seen():
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_a_report_leaves_failed_requests_out_of_the_times():
    answers = [Answered(1.0, 3.0, 5, 2), Answered(2.0, 2.0, 1, 0), Answered(problem="status 429: no")]
    report = Measurement(3, 2.0, answers).report()
    assert (report["requests"], report["failed"], report["problems"]) == (3, 1, ["status 429: no"])
    assert (report["tokens"], report["accepted_tokens"], report["tokens_per_second"]) == (6, 2, 3.0)
    assert report["latency_seconds"] == {"p50": 2.0, "p95": 3.0, "p99": 3.0}
    assert report["token_seconds"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5}


def test_nobody_there_is_a_failed_request():
    found = ask(Endpoint("http://127.0.0.1:9/v1"), "m", "x", 1)
    assert "ConnectionRefusedError" in found.problem and math.isnan(found.first)


def test_what_it_cannot_measure(capsys, tmp_path):
    for arguments, words in (
        (["serve"], "MODEL, --url"),
        (["serve", "demo", "--url", "http://127.0.0.1:9/v1"], "MODEL, --url"),
        (["serve", "--url", "http://127.0.0.1:9/v1"], "--url"),
        (["serve", "--url", "http://127.0.0.1:9/v1", "--prompts", str(tmp_path / "none")], "none"),
        (["serve", "no-such-model"], "no-such-model"),
    ):
        assert main(["bench", *arguments]) == 2
        assert words in capsys.readouterr().err
    for arguments in (["decode", "demo"], ["serve", "demo", "--clients", "1,x"]):
        with pytest.raises(SystemExit):
            main(["bench", *arguments])


@pytest.mark.rare
def test_a_server_is_started_measured_and_ended(tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "load.json"
    prompts.write_text("def f(x):\nimport os, sys\n", encoding="utf-8")
    server = ["demo", "--draft", "ngram", "--policy", "2,1", "--option", "lowering=eager"]
    load = ["--clients", "1,3", "--requests", "4", "--max-tokens", "6", "--prompts", str(prompts)]
    assert main(["bench", "serve", *server, *load, "--output", str(output)]) == 0
    assert "tokens/s" in capsys.readouterr().out
    report = json.loads(output.read_text("utf-8"))
    assert report["model"] == "demo" and [one["clients"] for one in report["loads"]] == [1, 3]
    for one in report["loads"]:
        assert (one["requests"], one["failed"], one["tokens"]) == (4, 0, 24)
        assert one["latency_seconds"]["p50"] <= one["latency_seconds"]["p99"] <= one["seconds"]
        assert one["first_token_seconds"]["p99"] <= one["latency_seconds"]["p99"]
