"""What Inductor's own builds would find out of vector instructions is found without them, or they are left to it."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._inductor import config, cpu_vec_isa

from treespec_compiler.program import vectors

pytestmark = pytest.mark.converts  # what is compiled is counted or stood in for

COMPILER = shutil.which("g++") or shutil.which("clang++") or ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    vectors._known.cache_clear()
    yield
    vectors._known.cache_clear()


@needs_compiler
def test_what_is_said_is_what_a_build_finds():
    if not vectors.settings():  # another maker's CPU, or a torch that uses less than this one has
        return
    there = set(cpu_vec_isa.x86_isa_checker())
    widest = next(isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= there)
    assert widest.check_build(cpu_vec_isa.VecISA._avx_code)


@needs_compiler
def test_a_flag_that_a_compiler_does_not_know_is_refused():
    assert vectors.takes(COMPILER, ["-O1"])
    assert not vectors.takes(COMPILER, ["-O1", "-mno-such-instructions"])
    assert not vectors.takes("/nowhere/c++", [])


def test_instructions_that_torch_does_not_use_are_left_to_inductor(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert vectors.settings() == {}


def test_a_users_own_setting_stays(monkeypatch):
    for own in (True, False):
        with config.patch({"cpp.vec_isa_ok": own}):
            assert vectors.settings() == {}


def test_without_a_compiler_nothing_is_said():
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert vectors.settings() == {}
