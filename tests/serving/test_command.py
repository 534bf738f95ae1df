"""`treespec serve` as a process: it starts, answers, and ends by signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

TEXT = "def main():\n    "
COMMAND = [sys.executable, "-m", "treespec_compiler", "serve", "demo", "--draft", "ngram", "--port", "0"]
COMMAND += ["--option", "lowering=eager", "--policy", "2,1", "--name", "code"]


def wait_until_it_listens_no_more(url: str) -> None:
    for _ in range(600):
        try:
            httpx.get(url)
        except httpx.ConnectError:
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.rare)])
def test_a_second_signal_ends_it_at_once(number):
    """While an answer is under way that would take minutes."""
    command = [*COMMAND, "--max-tokens", "200000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("serving code at "))
            client = openai.OpenAI(base_url=line.split()[-1], api_key="-", max_retries=0, timeout=60)
            stream = client.completions.create(
                model="code", prompt=TEXT, max_tokens=1900, temperature=1.0, logit_bias={"0": -100}, stream=True
            )
            pieces = [next(stream)]
            process.send_signal(number)
            wait_until_it_listens_no_more(str(client.base_url))  # two equal signals that wait are one
            pieces.append(next(stream))  # the first one ends nothing
            process.send_signal(number)
            assert process.wait(timeout=60) == 0
            with pytest.raises((httpx.HTTPError, openai.APIError)):
                pieces += stream
            assert all(piece.choices[0].finish_reason is None for piece in pieces)
        finally:
            process.kill()


def test_the_command_serves_and_ends_by_a_signal(tmp_path):
    key = tmp_path / "key"
    key.write_text("mine\n")
    command = [*COMMAND, "--api-key-file", str(key)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("serving code at http://127.0.0.1:"))
            client = openai.OpenAI(base_url=line.split()[-1], api_key="mine", max_retries=0, timeout=60)
            stream = client.completions.create(model="code", prompt=TEXT, max_tokens=60, temperature=0, stream=True)
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += stream
            assert pieces[-1].choices[0].finish_reason == "length"
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def process_of_rank(rank: int, launcher: int) -> int:
    """The child of the launcher that is this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.rare
def test_ranks_serve_together_and_end_with_one():
    with subprocess.Popen([*COMMAND, "--mesh", "tp=2"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("serving code at "))
            client = openai.OpenAI(base_url=line.split()[-1], api_key="-", max_retries=0, timeout=60)
            answer = client.completions.create(model="code", prompt=TEXT, max_tokens=8, temperature=0)
            assert answer.usage.completion_tokens == 8
            os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
            assert process.wait(timeout=120) == 3
        finally:
            process.kill()


def test_a_command_without_what_it_needs(tmp_path, capsys):
    from treespec_compiler.cli.main import main

    assert main(["serve", "demo", "--api-key-file", str(tmp_path / "none")]) == 2
    assert "--api-key-file" in capsys.readouterr().err
