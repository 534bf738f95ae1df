"""The GPU suite's driver: what is asked for, what runs together, what is wrong or takes too long."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_suite  # noqa: E402

pytestmark = pytest.mark.slow


def suite(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "status, kernel, model, code, last",
    [
        ("done", True, True, 0, "0 of 2 sections not done, 0 of 3 checks wrong"),
        ("done", False, True, 1, "0 of 2 sections not done, 1 of 3 checks wrong"),
        ("done", False, False, 1, "0 of 2 sections not done, 2 of 3 checks wrong"),
        ("failed", True, True, 1, "1 of 2 sections not done, 0 of 3 checks wrong"),
    ],
)
def test_wrong_numbers_are_failures(monkeypatch, capsys, status, kernel, model, code, last):
    rows = [{"name": "a", "ok": True, "error": 0.0}, {"name": "b", "ok": kernel, "error": "ValueError: b"}]
    sections = {
        "numerics 1": {"status": "done", "kernels": rows},
        "oracle 1": {"status": status, "models": [{"name": "c", "lowering": "eager", "ok": model, "error": math.nan}]},
    }
    found = {"status": "smoke", "run": {"device": "d", "date": "now"}, "sections": sections, "projection": []}
    monkeypatch.setattr(gpu_suite, "run", lambda arguments, path: found)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--smoke"])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    assert ended.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def asked(monkeypatch, *only):
    """Names of the sections that a run starts."""
    started = []

    class Running:
        def __init__(self, arguments, section, budget, folder, together):
            self.section = section
            started.append(section.name)

        def results(self):
            return {"status": "done"}

    monkeypatch.setattr(gpu_suite, "Running", Running)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--device", "cpu", "--smoke", "--only", *only])
    gpu_suite.run(gpu_suite.parse(), None)
    return started


def test_a_bare_name_stands_for_all_parts(monkeypatch):
    assert asked(monkeypatch, "attention", "numerics") == ["numerics 1", "numerics 2", "numerics 3", "attention"]
    assert asked(monkeypatch, "oracle 3", "step") == ["oracle 3", "step 8B", "step 1B"]
    assert asked(monkeypatch, "step 8B", "compile again", "variants") == ["step 8B", "compile again", "variants"]


def test_all_adds_what_compiles_to_the_checks():
    plain, everything = gpu_suite.asked((), False), gpu_suite.asked((), True)
    assert plain == list(gpu_suite.SECTIONS) and {*everything} - {*plain} == {gpu_suite.VARIANTS}
    checks, *timed = gpu_suite.groups(everything)
    assert gpu_suite.VARIANTS in checks and all(len(group) == 1 for group in timed)


def test_processes_that_run_together_share_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py"])
    arguments = gpu_suite.parse()

    def threads(together):
        return gpu_suite.environment(arguments, gpu_suite.SECTIONS[0], tmp_path, together).get("OMP_NUM_THREADS")

    assert [threads(n) for n in (1, 7, 32)] == [None, "2", "1"]


@pytest.mark.parametrize(
    "given, message",
    [
        (("--only", "numeric"), "got 'numeric', expected numerics, oracle, "),
        (("--only", "oracle 9"), "or one part such as 'numerics 1'"),
        (("--budget", "-5"), "got '-5', expected seconds, more than 0"),
        (("--budget", "inf"), "got 'inf', expected seconds, more than 0"),
        (("--budget", "long"), "got 'long', expected seconds, more than 0"),
    ],
)
def test_arguments_that_nothing_can_be_done_with(monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *given])
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.parse()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "No such file or directory"),
        ('{"status": "meas', "not JSON: Unterminated string"),
        ("[]", "it has no 'status'"),
        ('{"run": {}}', "it has no 'status'"),
    ],
)
def test_showing_what_is_no_run(monkeypatch, tmp_path, text, why):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--show", str(path)])
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main()
    message = ended.value.code
    assert message.startswith(f"got {str(path)!r}, expected a file that this script wrote: {why}")
    assert "\n" not in message


def test_budgets_fit_into_the_time():
    every = [max(s.budget for s in group) for group in gpu_suite.groups(gpu_suite.SECTIONS)]
    assert sum(every) <= gpu_suite.TOTAL < 480


def test_without_a_gpu(tmp_path):
    done = suite("--out", tmp_path / "out.json")
    assert done.returncode == 1 and "not measured: torch" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["status"] == "not measured" and found["run"]["date"] and found["run"]["versions"]["treespec"]


@pytest.mark.rare
def test_a_section_that_takes_too_long_leaves_the_others(tmp_path):
    """The first has no time, the second beside it has."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import dataclasses, gpu_suite
first, second = (next(s for s in gpu_suite.SECTIONS if s.name == n) for n in ("numerics 1", "attention"))
gpu_suite.SECTIONS = (dataclasses.replace(first, budget=0.2), dataclasses.replace(second, beside=True, budget=900))
"""
    script = tmp_path / "driver.py"
    script.write_text(program + "sys.argv[0] = gpu_suite.__file__\ngpu_suite.main()\n")
    out = tmp_path / "out.json"
    command = [sys.executable, str(script), "--device", "cpu", "--smoke", "--out", str(out), "--budget", "900"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    found = json.loads(out.read_text())
    assert done.returncode == 1 and found["run"]["versions"]["torch"]
    assert found["sections"]["numerics 1"]["status"] == "out of time"
    assert found["sections"]["attention"]["status"] == "done"
